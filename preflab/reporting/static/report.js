"use strict";
// Without this script all pages are shown one below the other, and only the search is missing.
const pages = [...document.querySelectorAll(".page")];
const links = [...document.querySelectorAll(".top nav a")];

function show() {
  // Ids have letters, digits and hyphens only, so nothing in an address needs decoding.
  const id = location.hash.slice(1);
  const target = id && document.getElementById(id);
  const page = (target && target.closest(".page")) || pages[0];
  for (const each of pages) each.classList.toggle("shown", each === page);
  for (const link of links) {
    if (link.hash.slice(1) === page.id) {
      link.setAttribute("aria-current", "page");
      link.scrollIntoView({ block: "nearest", inline: "nearest" });
    } else link.removeAttribute("aria-current");
  }
  if (target && target !== page) target.scrollIntoView();
  else scrollTo(0, 0);
  return page;
}

document.documentElement.classList.add("paged");
show();
addEventListener("hashchange", () => show().querySelector("h2").focus({ preventScroll: true }));

const AT_ONCE = 20;
for (const form of document.querySelectorAll(".search")) {
  const [input, select, count] = ["input", "select", "output"].map((name) => form.querySelector(name));
  const more = form.parentElement.querySelector(".more");
  const pairs = [...form.parentElement.querySelectorAll(".pair")];
  const texts = pairs.map((pair) => pair.textContent.toLowerCase());
  let most = AT_ONCE;
  const filter = () => {
    // All words must occur, in any order.
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let found = 0;
    pairs.forEach((pair, k) => {
      const fits = words.every((word) => texts[k].includes(word));
      const chosen = select.value === "" || pair.dataset.of.split("|").includes(select.value);
      found += fits && chosen;
      pair.hidden = !(fits && chosen && found <= most);
    });
    count.textContent = `${Math.min(found, most)} shown of ${found} found in ${pairs.length}`;
    more.hidden = found <= most;
  };
  form.hidden = false;
  form.addEventListener("input", () => { most = AT_ONCE; filter(); });
  form.addEventListener("submit", (event) => event.preventDefault());
  more.addEventListener("click", () => { most += AT_ONCE; filter(); });
  filter();
}
