/*
 * Draws the charts from the page's data. Text from the data reaches the page only through plotly, escaped by plain().
 * plotly turns <b> and <sup> into style attributes, which the page's policy forbids: weights are set on fonts, and
 * logarithmic axes get ticks whose exponents are Unicode.
 */
(() => {
  "use strict";
  const specs = JSON.parse(document.getElementById("report-data").textContent);
  const places = [...document.querySelectorAll(".chart[data-chart]")];
  const root = document.documentElement;
  const darkness = matchMedia("(prefers-color-scheme: dark)");
  const paper = matchMedia("print");
  const coarse = matchMedia("(pointer: coarse)").matches;
  const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "star", "hexagon2"];
  const EDGES = {
    "+inf": { symbol: "triangle-up", y: 0.96, text: "+∞" },
    "-inf": { symbol: "triangle-down", y: 0.04, text: "−∞" },
    nan: { symbol: "x", y: 0.96, text: "NaN" },
  };
  const CONFIG = { displayModeBar: false, responsive: true, showTips: false, doubleClick: "reset" };
  const FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, sans-serif';
  let zoom = null;
  let following = false;

  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

  function palette() {
    const style = getComputedStyle(root);
    const read = (name) => style.getPropertyValue("--" + name).trim();
    const tones = Array.from({ length: 8 }, (_, index) => read("tone" + index));
    return { tone: (index) => tones[index % 8], read };
  }

  function axis(colours, more) {
    return {
      color: colours.read("muted"), gridcolor: colours.read("grid"), linecolor: colours.read("edge"), zeroline: false,
      showline: true, ticks: "outside", ticklen: 3, tickcolor: colours.read("edge"), automargin: true, nticks: 6, ...more,
    };
  }

  function layout(colours, more) {
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, autosize: true,
      margin: { l: 46, r: 12, t: 10, b: 38 }, font: { family: FONT, size: 12, color: colours.read("text") },
      hovermode: "closest", dragmode: coarse ? false : "zoom",
      hoverlabel: {
        bgcolor: colours.read("card"), bordercolor: colours.read("edge"), namelength: -1,
        font: { family: FONT, size: 12, color: colours.read("text") },
      },
      ...more,
    };
  }

  const SUPERSCRIPTS = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };

  function tickText(mantissa, power) {
    if (power >= -3 && power <= 4) return String(Number((mantissa * 10 ** power).toPrecision(3)));
    const raised = "10" + [...String(power)].map((digit) => SUPERSCRIPTS[digit]).join("");
    return mantissa === 1 ? raised : mantissa + "·" + raised;
  }

  /* Ticks of a logarithmic axis from low to high: the coarsest set of which at least three are in sight. */
  function logTicks(low, high) {
    const from = Math.floor(Math.log10(low)) - 1, to = Math.ceil(Math.log10(high)) + 1;
    const every = Math.max(1, Math.ceil((to - from - 2) / 6));
    const sets = [[1], [1, 3], [1, 2, 5], [1, 1.5, 2, 3, 4, 5, 6, 8], Array.from({ length: 45 }, (_, at) => (10 + 2 * at) / 10)];
    for (const set of sets) {
      const ticks = [];
      for (let power = from; power <= to; power += 1) {
        if (set.length > 1 || power % every === 0) ticks.push(...set.map((mantissa) => [mantissa, power]));
      }
      const seen = ticks.filter(([mantissa, power]) => mantissa * 10 ** power >= low * 0.97 && mantissa * 10 ** power <= high * 1.03);
      if (seen.length >= 3 || set === sets[sets.length - 1]) {
        return { tickvals: ticks.map(([mantissa, power]) => mantissa * 10 ** power), ticktext: ticks.map(([mantissa, power]) => tickText(mantissa, power)) };
      }
    }
    return {};
  }

  const title = (text) => ({ text: plain(text), standoff: 6 });

  const symbol = (tone) => SYMBOLS[tone % SYMBOLS.length];

  /* Which points of a curve carry its marker: all of a short or interrupted one, else a few, apart from its neighbours'. */
  function marked(line, several) {
    const at = line.y.flatMap((value, index) => (value === null ? [] : [index]));
    if (several && at.length <= 12) return at;
    const alone = at.filter((index) => line.y[index - 1] == null && line.y[index + 1] == null);
    const few = (several ? [0, 1, 2, 3] : []).map((part) => at[Math.floor((at.length * (part + (line.tone % 8 + 0.5) / 8)) / 4)]);
    return [...new Set([...alone, ...few])];
  }

  function edgeTraces(line, colours) {
    return Object.entries(EDGES).flatMap(([kind, edge]) => {
      const steps = line.marks.filter((mark) => mark[1] === kind).map((mark) => mark[0]);
      if (!steps.length) return [];
      return [{
        type: "scatter", mode: "markers", x: steps, y: steps.map(() => edge.y), yaxis: "y2", name: plain(line.name),
        text: steps.map(() => edge.text), hovertemplate: "%{text} at step %{x}", cliponaxis: false,
        marker: { symbol: edge.symbol, size: 9, color: colours.read("critical"), line: { width: 1, color: colours.read("card") } },
      }];
    });
  }

  function thresholdTraces(spec, colours) {
    const steps = spec.lines.flatMap((line) => line.x);
    const values = spec.lines.flatMap((line) => line.y).filter((value) => value !== null);
    if (!steps.length || !values.length) return [];
    const low = values.reduce((a, b) => Math.min(a, b)), high = values.reduce((a, b) => Math.max(a, b));
    const span = high - low || Math.abs(high) || 1;
    const seen = new Set();
    return spec.bands.flatMap((band) => {
      const level = band.threshold;
      if (level === null || seen.has(level) || (spec.log && level <= 0)) return [];
      // A threshold far outside would flatten the curve; its number stands in the finding's evidence.
      if (spec.log ? level > high * 1e3 || level < low / 1e3 : level > high + 1.5 * span || level < low - 1.5 * span) return [];
      seen.add(level);
      const ends = [steps.reduce((a, b) => Math.min(a, b)), steps.reduce((a, b) => Math.max(a, b))];
      return [{
        type: "scatter", mode: "lines+text", x: ends, y: [level, level], hoverinfo: "skip", cliponaxis: false,
        text: ["", plain(band.tag) + " threshold " + Number(level.toPrecision(4))], textposition: "top left",
        textfont: { size: 11, color: colours.read(band.severity) },
        line: { color: colours.read(band.severity), width: 1.5, dash: "7px,4px" },
      }];
    });
  }

  function bandMarks(spec, colours) {
    const shapes = [], annotations = [];
    spec.bands.forEach((band, row) => {
      const tint = colours.read(band.severity);
      const late = band.from - spec.steps[0] > 0.85 * (spec.steps[1] - spec.steps[0]);
      const common = { xref: "x", yref: "paper", y0: 0, y1: 1, layer: "below" };
      if (band.to > band.from) {
        shapes.push({ ...common, type: "rect", x0: band.from, x1: band.to, fillcolor: tint, opacity: 0.12, line: { width: 0 } });
      }
      shapes.push({ ...common, type: "line", x0: band.from, x1: band.from, line: { color: tint, width: 1.5, dash: "dot" } });
      annotations.push({
        xref: "x", yref: "paper", x: band.from, y: 1 - 0.11 * (row % 7), xanchor: late ? "right" : "left", yanchor: "top", showarrow: false,
        text: plain(band.tag), font: { size: 11, color: tint, weight: 700 }, bgcolor: colours.read("card"), borderpad: 1, xshift: late ? -2 : 2,
      });
    });
    return { shapes, annotations };
  }

  function curve(spec, colours) {
    const traces = spec.lines.map((line) => ({
      type: "scatter", mode: "lines", x: line.x, y: line.y, name: plain(line.name), connectgaps: false,
      line: { color: colours.tone(line.tone), width: 1.6, dash: line.dash ? "5px,3px" : "solid" }, hovertemplate: "%{y:.5~g}",
    }));
    const markers = spec.lines.map((line) => {
      const at = marked(line, spec.lines.length > 1);
      return {
        type: "scatter", mode: "markers", x: at.map((index) => line.x[index]), y: at.map((index) => line.y[index]), hoverinfo: "skip",
        marker: { symbol: symbol(line.tone), size: 8, color: colours.tone(line.tone), line: { width: 1, color: colours.read("card") } },
      };
    });
    const edges = spec.lines.flatMap((line) => edgeTraces(line, colours));
    const marks = bandMarks(spec, colours);
    const thresholds = thresholdTraces(spec, colours);
    const drawn = [...traces, ...thresholds].flatMap((trace) => trace.y).filter((value) => value !== null);
    const ticks = spec.log && drawn.length ? logTicks(drawn.reduce((a, b) => Math.min(a, b)), drawn.reduce((a, b) => Math.max(a, b))) : {};
    const room = 0.02 * (spec.steps[1] - spec.steps[0]);
    const range = { range: zoom ? zoom.slice() : [spec.steps[0] - room, spec.steps[1] + room], autorange: false };
    return {
      traces: [...traces, ...markers, ...thresholds, ...edges],
      layout: layout(colours, {
        ...marks, hovermode: "x unified",
        xaxis: axis(colours, { title: title("step"), hoverformat: ",d", exponentformat: "none", separatethousands: true, ...range }),
        yaxis: axis(colours, {
          type: spec.log ? "log" : "linear", fixedrange: true, title: spec.unit ? title(spec.unit) : undefined,
          exponentformat: "e", minexponent: 4, rangemode: spec.share ? "tozero" : "normal", ...ticks,
        }),
        yaxis2: { overlaying: "y", range: [0, 1], visible: false, fixedrange: true },
      }),
    };
  }

  /* An arm's label over several lines, broken at commas. */
  function wrapped(label) {
    const lines = [""];
    for (const part of String(label).split(/(?<=,)/)) {
      if (lines[lines.length - 1].length + part.length > 18 && lines[lines.length - 1]) lines.push("");
      lines[lines.length - 1] += part;
    }
    return lines.map(plain).join("<br>");
  }

  function seeds(spec, colours) {
    const at = spec.labels.map((_, index) => index);
    const traces = spec.lines.map((line) => ({
      type: "scatter", mode: "lines+markers", x: at, y: line.y, name: plain(line.name), connectgaps: false,
      line: { color: colours.read("muted"), width: 1 },
      marker: {
        size: line.diverged.map((bad) => (bad ? 10 : 8)), symbol: line.diverged.map((bad, index) => (bad ? "x" : symbol(index))),
        color: at.map(colours.tone), line: { width: 1, color: colours.read("card") },
      },
      hovertemplate: "%{y:.5~g}",
    }));
    traces.push({
      type: "scatter", mode: "markers", x: at, y: spec.means, name: "mean", hovertemplate: "mean %{y:.5~g}<extra></extra>",
      marker: { symbol: "line-ew", size: 34, line: { width: 3, color: at.map(colours.tone) } },
    });
    return {
      traces,
      layout: layout(colours, {
        xaxis: axis(colours, {
          tickvals: at, ticktext: spec.labels.map(wrapped), range: [-0.5, at.length - 0.5], fixedrange: true, showgrid: false,
        }),
        yaxis: axis(colours, { title: title(spec.unit), fixedrange: true }),
      }),
    };
  }

  function differences(spec, colours) {
    const rows = spec.rows.map((row, index) => ({ ...row, at: spec.rows.length - 1 - index }));
    const traces = rows.flatMap((row) => {
      const tint = colours.tone(row.tone);
      const bounded = row.low !== null && row.high !== null;
      const middle = {
        type: "scatter", mode: "markers", x: [row.mean], y: [row.at], name: "mean", marker: { symbol: "diamond", size: 12, color: tint },
        hovertemplate: "mean %{x:.4~g}<extra></extra>",
      };
      if (bounded) {
        middle.error_x = {
          type: "data", symmetric: false, array: [row.high - row.mean], arrayminus: [row.mean - row.low], color: tint, thickness: 2, width: 6,
        };
      }
      const dots = {
        type: "scatter", mode: "markers", x: row.dots, y: row.dots.map(() => row.at - 0.22), name: "seed",
        marker: { size: 7, color: tint, opacity: 0.65 }, hovertemplate: "seed %{x:.4~g}<extra></extra>",
      };
      return [dots, middle];
    });
    return {
      traces,
      layout: layout(colours, {
        shapes: [{
          type: "line", xref: "x", yref: "paper", x0: 0, x1: 0, y0: 0, y1: 1, layer: "below",
          line: { color: colours.read("muted"), width: 1.5, dash: "dash" },
        }],
        xaxis: axis(colours, { title: title(spec.unit), fixedrange: true }),
        yaxis: axis(colours, {
          tickvals: rows.map((row) => row.at), ticktext: rows.map((row) => wrapped(row.label) + "<br>" + plain(row.verdict)),
          range: [-0.6, rows.length - 0.4], fixedrange: true, showgrid: false,
        }),
      }),
    };
  }

  function sweep(spec, colours) {
    const traces = spec.lines.flatMap((line) => {
      const tint = colours.tone(line.tone);
      const pairs = line.seeds.flatMap((losses, at) => losses.map((loss) => [spec.lrs[at], loss]));
      const best = spec.lrs.findIndex((rate) => line.best !== null && Math.abs(rate - line.best) <= 1e-9 * Math.abs(line.best));
      const drawn = [
        {
          type: "scatter", mode: "markers", x: pairs.map((pair) => pair[0]), y: pairs.map((pair) => pair[1]), hoverinfo: "skip",
          marker: { size: 5, color: tint, opacity: 0.45 },
        },
        {
          type: "scatter", mode: "lines+markers", x: spec.lrs, y: line.mean, name: plain(line.name),
          line: { color: tint, width: 2 }, marker: { symbol: symbol(line.tone), size: 8, color: tint },
          hovertemplate: "%{y:.5~g}",
        },
      ];
      if (best >= 0) {
        drawn.push({
          type: "scatter", mode: "markers", x: [spec.lrs[best]], y: [line.mean[best]], hoverinfo: "skip",
          marker: { symbol: "circle-open", size: 17, color: tint, line: { width: 2 } },
        });
      }
      return drawn;
    });
    const rates = spec.lrs.length > 9 ? { exponentformat: "e", dtick: 1 } : {
      tickvals: spec.lrs, ticktext: spec.lrs.map((rate) => Number(rate.toPrecision(2)).toExponential()),
    };
    const shapes = spec.initial === null ? [] : [{
      type: "line", xref: "paper", yref: "y", x0: 0, x1: 1, y0: spec.initial, y1: spec.initial,
      line: { color: colours.read("muted"), width: 1.5, dash: "dot" },
    }];
    return {
      traces,
      layout: layout(colours, {
        shapes, hovermode: "x unified",
        xaxis: axis(colours, { type: "log", title: title("learning rate"), fixedrange: true, hoverformat: ".3~g", ...rates }),
        yaxis: axis(colours, { title: title(spec.unit), fixedrange: true }),
      }),
    };
  }

  const KINDS = { curve, seeds, differences, sweep };

  function draw(place, size) {
    const spec = specs[place.dataset.chart];
    const figure = KINDS[spec.kind](spec, palette());
    if (size) Object.assign(figure.layout, { autosize: false, ...size(place) });
    const first = !place.classList.contains("js-plotly-plot");
    const done = Plotly.react(place, figure.traces, figure.layout, CONFIG);
    if (first && spec.kind === "curve") place.on("plotly_relayout", (change) => follow(place, change));
    return done;
  }

  /* A zoom on one curve shows the same steps on all. */
  function follow(source, change) {
    if (following) return;
    if (change["xaxis.range[0]"] !== undefined) zoom = [change["xaxis.range[0]"], change["xaxis.range[1]"]];
    else return;
    following = true;
    const update = { "xaxis.range": zoom.slice() };
    const others = places.filter((place) => place !== source && specs[place.dataset.chart].kind === "curve" && place._fullLayout);
    Promise.all(others.map((place) => Plotly.relayout(place, update))).finally(() => { following = false; });
  }

  function redraw(size) {
    for (const place of places) draw(place, size);
  }

  /* What fits two columns of an A4 or Letter page with the style sheet's margins. */
  const onPaper = (place) => (place.closest(".wide") ? { width: 684, height: 320 } : { width: 326, height: 230 });

  function print(on) {
    if (root.classList.contains("print") === on) return;
    root.classList.toggle("print", on);
    for (const details of document.querySelectorAll("details")) {
      if (on && !details.open) { details.dataset.closed = "yes"; details.open = true; }
      else if (!on && details.dataset.closed) { delete details.dataset.closed; details.open = false; }
    }
    redraw(on ? onPaper : undefined);
  }

  async function start() {
    for (const place of places) {
      try {
        await draw(place);
      } catch (error) {
        place.textContent = "This chart could not be drawn.";
        console.error(error);
      }
    }
    darkness.addEventListener("change", () => redraw());
    paper.addEventListener("change", (change) => print(change.matches));
    addEventListener("beforeprint", () => print(true));
    addEventListener("afterprint", () => print(false));
    root.dataset.drawn = String(places.length);
  }

  start();
})();
