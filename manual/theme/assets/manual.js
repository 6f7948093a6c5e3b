// For keyboards and screen readers, and for people who look for options.
(() => {
  document.querySelector(".md-search")?.setAttribute("aria-label", "Search");

  // Sections with a page of their own have an empty label, so that their lists have no name.
  for (const nav of document.querySelectorAll("nav.md-nav[aria-labelledby]")) {
    if (document.getElementById(nav.getAttribute("aria-labelledby"))?.textContent.trim()) continue;
    nav.setAttribute("aria-label", nav.querySelector(".md-nav__title")?.textContent.trim() || "Section");
    nav.removeAttribute("aria-labelledby");
  }

  // What scrolls sideways can be reached with a keyboard, and the buttons of each block of code have a name.
  function reach() {
    document.querySelectorAll(".md-code__nav").forEach((nav, n) => nav.setAttribute("aria-label", `Code ${n + 1}`));
    for (const box of document.querySelectorAll(".md-typeset__scrollwrap, .md-typeset pre > code")) {
      if (box.scrollWidth > box.clientWidth) box.setAttribute("tabindex", "0");
      else box.removeAttribute("tabindex");
    }
  }
  window.addEventListener("load", () => setTimeout(reach, 0));
  window.addEventListener("resize", reach);

  // The search takes a word behind a dash for one that must not be there, and people look for `--max-delay-us`.
  const field = document.querySelector(".md-search__input");
  const own = Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, "value");
  if (field) {
    Object.defineProperty(field, "value", {
      get() { return own.get.call(this).replace(/(^|\s)-+(?=\w)/g, "$1"); },
      set(text) { own.set.call(this, text); },
    });
  }
})();
