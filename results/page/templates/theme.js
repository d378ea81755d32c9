// The theme of the system unless a button overrides it; the choice is stored where the browser allows it.
(() => {
  const key = "report-theme";
  let choice = "auto";
  try { choice = localStorage.getItem(key) ?? "auto"; } catch { /* a page in a sandboxed frame has no storage */ }
  document.documentElement.classList.add("scripted");
  const apply = () => {
    if (choice === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = choice;
    for (const button of document.querySelectorAll(".themes button")) {
      button.setAttribute("aria-pressed", String(button.dataset.choice === choice));
    }
  };
  apply();
  document.addEventListener("DOMContentLoaded", () => {
    document.querySelector(".themes").hidden = false;
    apply();
  });
  document.addEventListener("click", (event) => {
    const button = event.target.closest(".themes button");
    if (!button) return;
    choice = button.dataset.choice;
    try { localStorage.setItem(key, choice); } catch { /* then it holds until the page is closed */ }
    apply();
  });
})();
