"""``python -m densenet_dist``: the same as the command densenet-dist."""

from densenet_dist.cli import main

if __name__ == "__main__":
    main()
