"""What the pages of runs have beside the style of all pages: colours of splits and runs, tiles, bars."""

from typing import Final

STYLE: Final = """\
:root {
  --train: #2a78d6; --val: #e0570c; --test: #c62f3f;
  --run0: #2a78d6; --run1: #e0570c; --run2: #12906a; --run3: #6a4fc4; --run4: #c62f3f; --run5: #8a6d1f;
  --run6: #c24e9d; --run7: #4b8a99;
}
@media (prefers-color-scheme: dark) {
  :root {
    --train: #5a9ff0; --val: #f08a3c; --test: #f0697a;
    --run0: #5a9ff0; --run1: #f08a3c; --run2: #3bbd93; --run3: #a48df0; --run4: #f0697a; --run5: #cfae55;
    --run6: #e58cc8; --run7: #7fbccb;
  }
}
h3 { margin: 1.4rem 0 0.4rem; font-size: 1rem; }
.tiles { display: flex; flex-wrap: wrap; gap: 1rem; }
.tiles figure { width: 8rem; }
.tiles img, .tiles .none {
  display: block; width: 8rem; height: 8rem; object-fit: contain; background: var(--raised);
  image-rendering: pixelated;
}
.tiles figcaption { color: var(--ink); line-height: 1.35; overflow-wrap: anywhere; }
.tiles small { color: var(--muted); }
.bar { display: inline-block; width: 8rem; height: 0.7rem; margin-left: 0.6rem; background: var(--raised); }
.bar i { display: block; height: 100%; background: var(--train); }
table.layers td { padding: 0.1rem 0.7rem; font-family: ui-monospace, monospace; }
tr.group td { font-weight: 600; }
tr.group td span { font-weight: 400; color: var(--muted); }
.key { display: inline-block; width: 0.8rem; height: 0.8rem; margin-right: 0.5rem; vertical-align: -0.05rem; }
"""
