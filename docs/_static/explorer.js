// Draws the explorers that a notebook saved (offpolicy_rl.lab.explorer_grid): range inputs over a precomputed grid, four plotly panels.
// Uses window.orl of orl.js: plotly is loaded once, figures follow the page's light or dark colours.
(() => {
  const here = document.currentScript.src.replace(/explorer\.js.*$/, '');
  const STEPS = 65534, NOTHING = 65535, LEAST_LOG_VARIANCE = -3;

  const element = (tag, attributes = {}, ...children) => {
    const made = Object.assign(document.createElement(tag), attributes);
    made.append(...children);
    return made;
  };

  // A table of the grid: `at(i, j, ...)` gives what stands behind the first indices, `all` everything.
  const decode = table => {
    const bytes = Uint8Array.from(atob(table.data), c => c.charCodeAt(0)), view = new DataView(bytes.buffer);
    const all = Array.from({length: bytes.length / 2}, (_, i) => {
      const code = view.getUint16(2 * i, true);
      return code === NOTHING ? null : table.lo + code / STEPS * (table.hi - table.lo);
    });
    const at = (...index) => {
      const size = table.shape.slice(index.length).reduce((a, b) => a * b, 1);
      const row = index.reduce((sum, i, k) => sum * table.shape[k] + i, 0);
      return all.slice(row * size, (row + 1) * size);
    };
    return {shape: table.shape, all, at};
  };

  const number = value => {
    if (value !== 0 && Math.abs(value) < 1e-3) return value.toExponential(1).replace('.0e', 'e').replace('-', '−');
    return String(Number(value.toPrecision(3))).replace('-', '−');
  };
  const reading = {
    mu_age: v => v || 'on-policy', mu_temperature: number,
    mu_mixture: v => `${Math.round(100 * v)} %`, mu_noise: v => `${number(v)} nats`,
  };

  let serial = 0;
  const labelled = (text, input, output = '') => {
    input.id = `orl-explorer-${++serial}`;
    if (output) output.htmlFor = input.id;
    return element('div', {className: 'orl-control'}, element('label', {htmlFor: input.id}, text), input, output);
  };
  const slider = (text, count, start, read, moved) => {
    const input = element('input', {type: 'range', min: 0, max: count - 1, step: 1}), output = element('output');
    const show = () => { output.value = read(+input.value); input.setAttribute('aria-valuetext', output.value); };
    input.value = start;
    input.addEventListener('input', () => { show(); moved(+input.value); });
    show();
    return {row: labelled(text, input, output), input, show, label: label => { input.parentElement.firstChild.textContent = label; }};
  };
  const box = (text, start, moved) => {
    const input = element('input', {type: 'checkbox', checked: Boolean(start)});
    input.addEventListener('change', () => moved(+input.checked));
    return labelled(text, input);
  };
  const choice = (text, names, start, moved) => {
    const input = element('select', {}, ...names.map((name, i) => element('option', {value: i}, name)));
    input.value = start;
    input.addEventListener('change', () => moved(+input.value));
    return labelled(text, input);
  };
  const note = text => element('p', {className: 'orl-note'}, text);

  const knobControls = (page, state, changed) => {
    const rows = page.knobs.map((knob, i) => {
      const moved = at => { state.knobs[i] = at; changed(); };
      if (typeof knob.values[0] === 'boolean') return box(knob.name, knob.start, moved);
      return slider(knob.name, knob.values.length, knob.start, at => number(knob.values[at]), moved).row;
    });
    if (!rows.length) rows.push(note('It has no knob to turn.'));
    if (page.idle.length && !page.brief) rows.push(note(`Without effect here: ${page.idle.join(', ')}.`));
    if (page.held.length && !page.brief) rows.push(note(`Not moved here: ${page.held.join(', ')}.`));
    return element('fieldset', {}, element('legend', {}, element('code', {}, page.name)), ...rows);
  };

  const behaviourControls = (page, state, changed, readout) => {
    const dial = () => page.dials[state.dial];
    const level = slider(dial().label, dial().values.length, state.level, at => reading[dial().name](dial().values[at]),
      at => { state.level = at; changed(); });
    const turn = at => { state.dial = at; level.label(dial().label); level.show(); changed(); };
    if (page.brief) return element('fieldset', {}, element('legend', {}, 'the data'), level.row, readout);
    const toys = choice('toy', page.toys, state.toy, at => { state.toy = at; changed(); });
    const dials = choice('μ differs by', ['age', 'temperature', 'random tokens', 'noise'], state.dial, turn);
    return element('fieldset', {}, element('legend', {}, 'the behaviour μ'), toys, dials, level.row, readout);
  };

  const legend = page => element('ul', {className: 'orl-legend'}, ...page.methods.map((method, i) => {
    const mark = element('span', {className: i ? 'orl-mark' : 'orl-mark orl-own'});
    mark.style.borderColor = method.colour;
    return element('li', {}, mark, method.name);
  }));

  const panel = (title, height) => {
    const plot = element('div');
    plot.setAttribute('role', 'img');
    plot.style.height = `${height}px`;
    return {plot, row: element('figure', {}, element('figcaption', {}, title), plot)};
  };

  const axis = (text, more = {}) => ({title: {text, standoff: 6, font: {size: 11}}, fixedrange: true, ...more});
  const margin = {l: 8, r: 14, t: 8, b: 8};

  const curves = (page, tables, state, column) => {
    const [first, last] = page.x, advantage = page.kind === 'advantage';
    return page.methods.map((method, i) => {
      const y = i ? tables.rival_coefficient.at(i - 1, column) : tables.coefficient.at(...state.knobs, column);
      const line = {color: method.colour, width: i ? 1.8 : 3.5, dash: i ? 'dot' : 'solid'};
      return {x0: first, dx: (last - first) / (y.length - 1), y, name: method.name, mode: advantage ? 'lines+markers' : 'lines', line};
    }).reverse();
  };
  const curveLayout = (page, column) => ({
    margin, showlegend: false, xaxis: axis(page.kind === 'advantage' ? 'correct answers among 8' : 'log π − log μ, nats'),
    yaxis: axis('', {range: page.span[column]}),
  });

  const dots = (page, values, texts, least) => [{
    x: values.map(v => v === null ? null : Math.max(v, least)), y: values.map((_, i) => i), text: texts,
    mode: 'markers+text', textposition: 'top center', cliponaxis: false, hovertemplate: '%{text}<extra></extra>',
    marker: {color: page.methods.map(m => m.colour), size: values.map((_, i) => i ? 11 : 15), opacity: 1, line: {width: 0}},
  }];
  const dotLayout = (page, xaxis) => {
    const names = page.methods.map(m => m.name);
    const range = [names.length - 0.5, -0.8];
    const yaxis = axis('', {range, tickvals: names.map((_, i) => i), ticktext: names, zeroline: false});
    return {margin, showlegend: false, xaxis, yaxis};
  };

  // Whole decades around every variance that the present toy and dial can show: the axis stands still while a slider moves.
  const decades = (tables, state) => {
    const seen = [tables.log_variance, tables.rival_log_variance].flatMap(table => {
      const [toys, dials, levels] = table.shape.slice(-3);
      const block = toys * dials * levels, from = (state.toy * dials + state.dial) * levels;
      return table.all.filter((v, i) => v !== null && i % block >= from && i % block < from + levels);
    });
    return [Math.max(Math.floor(Math.min(...seen) - 0.1), LEAST_LOG_VARIANCE), Math.ceil(Math.max(...seen) + 0.1)];
  };

  // The direction error and the variance of the method and its rivals where the controls stand, as numbers and as they are read.
  const moments = (page, tables, state) => {
    const where = [state.toy, state.dial, state.level];
    const one = (name, i) => i ? tables[`rival_${name}`].at(i - 1, ...where) : tables[name].at(...state.knobs, ...where);
    const all = name => page.methods.map((_, i) => one(name, i)[0]);
    const errors = all('direction_error'), logs = all('log_variance');
    const read = (values, text) => values.map(v => v === null ? 'refused' : text(v));
    const errorTexts = read(errors, v => v.toFixed(2)), variances = read(logs, v => number(10 ** v));
    return {errors, logs, errorTexts, variances, ess: tables.ess.at(...where)[0]};
  };

  const momentFigures = (page, tables, state, made) => {
    const sine = axis('sine of the angle to the gradient', {range: [-0.06, 1.06]});
    const range = decades(tables, state), tickvals = Array.from({length: range[1] - range[0] + 1}, (_, i) => range[0] + i);
    const log = axis('in units of |gradient|²', {range: [range[0] - 0.3, range[1]], tickvals, ticktext: tickvals.map(v => number(10 ** v))});
    return [[dots(page, made.errors, made.errorTexts, 0), dotLayout(page, sine)],
      [dots(page, made.logs, made.variances, range[0]), dotLayout(page, log)]];
  };

  // A page marked `brief` (the site's first one) shows the essence: knobs, the age of the data, three panels.
  const columns = page => !('coefficient' in page.tables) ? [] : page.brief ? [1] : [0, 1];
  const titles = page => {
    const drawn = page.kind === 'advantage' ? ['Advantage of a correct answer', 'Advantage of a wrong answer']
      : ['Coefficient of a good response, A = 1', 'Coefficient of a bad response, A = −1'];
    return [...columns(page).map(column => drawn[column]), 'Direction error, exact', 'Variance, exact'];
  };

  const build = async host => {
    const page = JSON.parse(host.querySelector('script').textContent);
    const tables = Object.fromEntries(Object.entries(page.tables).map(([name, table]) => [name, decode(table)]));
    const state = {knobs: page.knobs.map(knob => knob.start), ...page.start};
    const readout = element('p', {className: 'orl-note'}), spoken = element('p', {className: 'orl-spoken'});
    spoken.setAttribute('aria-live', 'polite');
    const panels = titles(page).map((title, i, all) => panel(title, !page.brief && i < all.length - 2 ? 240 : 90 + 34 * page.methods.length));
    let waiting = 0;
    const changed = () => { waiting ||= requestAnimationFrame(() => { waiting = 0; draw(); }); };
    const controls = [knobControls(page, state, changed), behaviourControls(page, state, changed, readout)];
    host.append(element('div', {className: 'orl-controls'}, ...controls), legend(page),
      element('div', {className: page.brief ? 'orl-panels orl-brief' : 'orl-panels'}, ...panels.map(p => p.row)), spoken);
    if (page.missing) host.append(note(`No coefficient: ${page.missing}`));
    const Plotly = await window.orl.plotly();
    const draw = () => {
      const made = moments(page, tables, state);
      const coefficients = columns(page).map(column => [curves(page, tables, state, column), curveLayout(page, column)]);
      const told = page.methods.map((m, i) => `${m.name}: direction error ${made.errorTexts[i]}, variance ${made.variances[i]}`).join('; ');
      [...coefficients, ...momentFigures(page, tables, state, made)].forEach(([data, layout], i) => {
        const {plot, row} = panels[i];
        Plotly.react(plot, data, window.orl.themed(layout), {responsive: true, displayModeBar: false});
        plot.setAttribute('aria-label', row.firstChild.textContent + (i >= panels.length - 2 ? `. ${told}` : ''));
      });
      const groups = page.group_size > 1 ? `, groups of ${page.group_size}` : '';
      readout.textContent = `Effective sample size ${Math.round(100 * made.ess)} %${groups}`;
      spoken.textContent = told;
    };
    draw();
    window.orl.onTheme(draw);
  };

  document.addEventListener('DOMContentLoaded', () => {
    const hosts = document.querySelectorAll('.orl-explorer');
    if (hosts.length && !document.querySelector('link[href*="explorer.css"]'))
      document.head.append(element('link', {rel: 'stylesheet', href: here + 'explorer.css'}));
    hosts.forEach(build);
  });
})();
