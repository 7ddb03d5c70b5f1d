for (const button of document.querySelectorAll("th button")) {
  button.onclick = () => {
    const head = button.parentElement, body = head.closest("table").tBodies[0];
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = row => {
      const cell = row.cells[head.cellIndex];
      return cell.dataset.value ? Number(cell.dataset.value) : cell.textContent.replace("★ ", "");
    };
    const compare = (a, b) => {
      if (a === "" || b === "") return (a === "") - (b === "");  // what is missing is last either way
      const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
      return down ? -order : order;
    };
    body.append(...[...body.rows].sort((a, b) => compare(key(a), key(b))));
  };
}
