// A link into something folded opens it; the style sheet marks the row of the linked trial (:target).
(() => {
  const reveal = () => {
    const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!target) return;
    const folded = [];
    for (let one = target.closest("details"); one; one = one.parentElement.closest("details")) folded.push(one);
    const own = target.querySelector(":scope > details"); // a section
    for (const one of own ? [own, ...folded] : folded) one.open = true;
    if (folded.length || own) target.scrollIntoView({ block: own ? "start" : "center" });
  };
  addEventListener("hashchange", reveal);
  document.addEventListener("click", (event) => { // also when the hash is the same as before
    if (event.target.closest("a[href^='#']") && !event.defaultPrevented) setTimeout(reveal);
  });
  reveal();

  // On paper everything is there but the long list of trials.
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("main > section > details:not([open]), details.setting:not([open])")];
    for (const one of opened) one.open = true;
  });
  addEventListener("afterprint", () => { for (const one of opened) one.open = false; });
})();
