// The choice is this browser's; the page's head applies it before anything is drawn.
document.addEventListener("click", event => {
  if (!event.target.closest("#theme")) return;
  const root = document.documentElement;
  root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
  localStorage.setItem("xsd-theme", root.dataset.theme);
});
