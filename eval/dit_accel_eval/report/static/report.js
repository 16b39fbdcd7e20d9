(function start() {
  const data = JSON.parse(byId("data").textContent);
  if (data.sheets.length) player(data);
  if (data.cubes.length) densityMap(data.cubes);
  const metric = byId("pareto-metric");
  if (metric) {
    metric.addEventListener("change", () => {
      for (const pair of document.querySelectorAll("[data-pareto]")) pair.hidden = pair.dataset.pareto !== metric.value;
    });
  }
})();
