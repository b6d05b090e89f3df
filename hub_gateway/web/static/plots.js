// Plots of the tables that stand beside them. A table stays what it is: the numbers, for whoever cannot see a plot.
//
// On the element: data-table, the id of the table; data-bars, data-line, the number of a column; data-limit, a value
// for a line across; data-days, where the rows are days, with the first and the last one in data-from and data-to.
"use strict";
{
  const DAY = 86400;
  const HEIGHT = 260;
  const MOST = 30;

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--plot-${name}`).trim();

  const moment = (day) => Date.parse(`${day}T00:00:00Z`) / 1000;

  const short = (text) => (text.length > 14 ? `${text.slice(0, 13)}…` : text);

  const number = (value) =>
    value == null ? "" : value.toLocaleString("en", { maximumFractionDigits: Math.abs(value) < 10 ? 2 : 0 });

  // What is drawn: names of the places on the x axis, their positions, and for each column its title and values.
  const read = (element) => {
    const table = document.getElementById(element.dataset.table);
    if (!table) return null;
    const columns = [element.dataset.bars, element.dataset.line].filter(Boolean).map(Number);
    const titles = columns.map((column) => table.tHead.rows[0].cells[column].textContent.trim());
    let rows = [...table.tBodies[0].rows].map((row) => ({
      key: row.cells[0].dataset.key,
      values: columns.map((column) => Number(row.cells[column].dataset.value)),
    }));
    let at;
    if ("days" in element.dataset) {
      const by = new Map(rows.map((row) => [row.key, row.values]));
      at = [];
      rows = [];
      for (let x = moment(element.dataset.from); x <= moment(element.dataset.to); x += DAY) {
        const key = new Date(x * 1000).toISOString().slice(0, 10);
        at.push(x);
        rows.push({ key, values: by.get(key) ?? columns.map(() => 0) });
      }
    } else {
      rows = rows.slice(0, Math.min(MOST, Math.floor((element.clientWidth - 112) / 24)));
      at = rows.map((_, index) => index);
    }
    const values = columns.map((_, number) => rows.map((row) => row.values[number]));
    return { names: rows.map((row) => row.key), at, titles, values };
  };

  const options = (element, found) => {
    const days = "days" in element.dataset;
    const step = days ? DAY : 1;
    const name = (x) => (days ? new Date(x * 1000).toISOString().slice(0, 10) : (found.names[x] ?? ""));
    const ink = { stroke: colour("ink"), grid: { stroke: colour("grid"), width: 1 }, ticks: { show: false } };
    const font = `12px ${getComputedStyle(document.body).fontFamily}`;
    const series = [
      { label: days ? "Day" : "Name", value: (_, x) => (x == null ? "–" : name(x)) },
      {
        label: found.titles[0],
        fill: colour("bars"),
        stroke: colour("bars"),
        width: 0,
        paths: uPlot.paths.bars({ size: [0.7, 36] }),
        points: { show: false },
        value: (_, value) => (value == null ? "–" : number(value)),
      },
    ];
    const steep = found.at.length > 4 || element.clientWidth < 500;
    const axes = [
      {
        ...ink,
        grid: { show: false },
        font,
        ...(days
          ? {
              values: (_, splits) => splits.map((x) => name(x).slice(5)),
              incrs: [1, 2, 7, 14, 28, 91, 364].map((count) => count * DAY),
              space: 52,
            }
          : {
              splits: () => found.at,
              values: (_, splits) => splits.map((x) => short(name(x))),
              rotate: steep ? -40 : 0,
              size: steep ? 80 : 34,
            }),
      },
      { ...ink, font, size: 56, values: (_, splits) => splits.map(number) },
    ];
    // From nothing, and never flat: an empty plot has an axis too.
    const range = (_, low, high) => [
      Math.min(0, low ?? 0),
      Math.max(high ?? 0, Number(element.dataset.limit ?? 0)) * 1.08 || 1,
    ];
    const scales = {
      x: { time: false, range: () => [found.at[0] - step * 0.6, found.at[found.at.length - 1] + step * 0.6] },
      y: { range },
    };
    if (element.dataset.limit) {
      series.push({
        label: element.dataset.limitName,
        stroke: colour("limit"),
        width: 2,
        dash: [6, 4],
        points: { show: false },
        value: (_, value) => number(value ?? Number(element.dataset.limit)),
      });
    }
    if (element.dataset.line) {
      scales.second = { range };
      series.push({
        label: found.titles[1],
        scale: "second",
        stroke: colour("line"),
        width: 2,
        ...(days ? {} : { paths: () => null }), // between names lies nothing
        points: { show: true, size: 6, fill: colour("line") },
        value: (_, value) => (value == null ? "–" : number(value)),
      });
      const second = { side: 1, scale: "second", size: 56, values: (_, splits) => splits.map(number) };
      axes.push({ ...ink, grid: { show: false }, font, ...second });
    }
    return {
      width: element.clientWidth,
      height: HEIGHT,
      series,
      axes,
      scales,
      cursor: { drag: { x: false, y: false }, y: false, points: { show: false } },
      legend: { markers: { width: 0, fill: (_, index) => (index ? series[index].stroke : null) } },
    };
  };

  const drawn = new Map();

  const draw = (element) => {
    drawn.get(element)?.destroy();
    drawn.delete(element);
    const found = read(element);
    if (!found?.at.length || !element.clientWidth) return;
    const data = [found.at, found.values[0]];
    if (element.dataset.limit) data.push(found.at.map(() => Number(element.dataset.limit)));
    if (element.dataset.line) data.push(found.values[1]);
    drawn.set(element, new uPlot(options(element, found), data, element));
  };

  const widths = new Map();
  const watcher = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      if (widths.get(target) === target.clientWidth) continue;
      widths.set(target, target.clientWidth);
      draw(target);
    }
  });
  for (const element of document.querySelectorAll(".plot")) watcher.observe(element);
  document.addEventListener("theme", () => [...drawn.keys()].forEach(draw));
}
