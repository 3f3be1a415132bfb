// Draws the page's plotly figures in the colours of the page, light or dark, and redraws them when that changes.
// Offers window.orl = {plotly, themed, isDark, onTheme} to other scripts of the site (explorer.js).
(() => {
  const here = document.currentScript.src.replace(/orl\.js.*$/, '');
  const narrow = () => window.innerWidth < 600;
  const isDark = () => document.documentElement.dataset.theme === 'dark';

  // Plotly is 5 MB: only a page with a figure loads it.
  let loading = null;
  const plotly = () => loading ??= new Promise((resolve, reject) => {
    const script = document.createElement('script');
    script.src = here + 'plotly.min.js';
    script.onload = () => resolve(window.Plotly);
    script.onerror = () => reject(new Error('plotly.min.js did not load'));
    document.head.append(script);
  });

  const axis = dark => ({
    gridcolor: dark ? '#3a3f47' : '#e3e6ea', zerolinecolor: dark ? '#5b626c' : '#c3c8cf',
    linecolor: dark ? '#5b626c' : '#c3c8cf', automargin: true,
  });
  const template = dark => ({
    paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)',
    font: {color: dark ? '#ced6dd' : '#222832', size: narrow() ? 10 : 12},
    xaxis: axis(dark), yaxis: axis(dark),
    hoverlabel: {bgcolor: dark ? '#222832' : '#ffffff', font: {color: dark ? '#ced6dd' : '#222832'}},
    legend: {bgcolor: 'rgba(0,0,0,0)'},
  });
  const merge = (below, above) => {
    const out = {...below};
    for (const [key, value] of Object.entries(above))
      out[key] = value?.constructor === Object && out[key]?.constructor === Object ? merge(out[key], value) : value;
    return out;
  };
  // A figure's own settings win over its template: only the template is adapted to the page.
  const themed = layout => {
    const own = layout.template ?? {};
    const {width, ...rest} = layout;
    for (const [name, axis] of Object.entries(rest))
      if (/^[xy]axis/.test(name) && axis.type === 'log' && axis.dtick === undefined && axis.tickvals === undefined) rest[name] = {...axis, dtick: 'D2'};
    if (narrow() && rest.annotations) rest.annotations = rest.annotations.map(note => ({...note, font: {...note.font, size: 10}}));
    return {...rest, autosize: true, template: {...own, layout: merge(own.layout ?? {}, template(isDark()))}};
  };

  const redraws = [];
  const onTheme = redraw => redraws.push(redraw);
  new MutationObserver(() => redraws.forEach(redraw => redraw()))
    .observe(document.documentElement, {attributes: true, attributeFilter: ['data-theme']});
  window.addEventListener('resize', (() => {
    let was = narrow();
    return () => { if (narrow() !== was) { was = narrow(); redraws.forEach(redraw => redraw()); } };
  })());

  // On a phone plotly would cut a long title off: it stands above the figure, where it wraps.
  const lifted = (layout, caption) => {
    const text = layout.title?.text ?? (typeof layout.title === 'string' ? layout.title : '');
    caption.innerHTML = narrow() ? text : '';
    if (!narrow() || !text) return layout;
    const legend = {orientation: 'h', yanchor: 'top', y: -0.25, xanchor: 'left', x: 0};
    const margin = {...layout.margin, l: 40, r: 10, t: 30};
    return {...layout, title: undefined, margin, legend: {...layout.legend, ...legend}};
  };

  // Panels side by side that would be too small to read on a phone keep their size, and the figure scrolls.
  const leastWidth = layout => {
    const sides = Object.keys(layout).filter(name => /^xaxis/.test(name)).map(name => layout[name].domain?.[0] ?? 0);
    return 130 * Math.max(1, new Set(sides).size) + (layout.margin?.l ?? 60) + 40;
  };

  const draw = async element => {
    const figure = JSON.parse(element.querySelector('script').textContent);
    const caption = document.createElement('div'), plot = document.createElement('div');
    caption.className = 'orl-caption';
    element.append(caption, plot);
    const Plotly = await plotly();
    const config = {responsive: true, displaylogo: false, displayModeBar: narrow() ? false : 'hover'};
    const redraw = () => {
      const layout = themed(lifted(figure.layout ?? {}, caption));
      plot.style.minWidth = narrow() ? `${leastWidth(figure.layout ?? {})}px` : '';
      return Plotly.react(plot, {data: figure.data, layout, frames: figure.frames ?? [], config});
    };
    await redraw();
    onTheme(redraw);
  };

  window.orl = {plotly, themed, isDark, onTheme};
  document.addEventListener('DOMContentLoaded', () => document.querySelectorAll('.orl-figure').forEach(draw));
})();
