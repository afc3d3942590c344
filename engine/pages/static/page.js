/* The script of both pages, the board of runs and the chat.

   Names, errors, samples and answers are data: they enter the page as text nodes, never as HTML.
   Sections: elements, theme, requests; charts; board; chat; start. */
'use strict';

// ---- Elements ---------------------------------------------------------------------------------

const byId = (id) => document.getElementById(id);
const SVG = 'http://www.w3.org/2000/svg';

/** Set attributes (true and false as present and absent) and append children to an element. */
function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith('on')) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, '');
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child != null && child !== false));
  return element;
}
const el = (tag, attributes = {}, ...children) =>
  filled(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  filled(document.createElementNS(SVG, tag), attributes, children);

/** Replace what an element holds, unless that would change nothing: focus and selection stay. */
function show(target, ...children) {
  const next = el('div', {}, ...children);
  if (next.innerHTML !== target.innerHTML) target.replaceChildren(...next.childNodes);
}

function debounced(action, wait = 200) {
  let timer = 0;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(action, wait);
  };
}

/** What the browser stores for this page; nothing where it refuses to. */
const stored = {
  read(store, key) {
    try { return window[store].getItem(key); } catch { return null; }
  },
  write(store, key, value) {
    try { window[store].setItem(key, value); } catch { /* private mode: it lasts for this page */ }
  },
};

// ---- Theme ------------------------------------------------------------------------------------

const THEMES = ['system', 'light', 'dark'];

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  stored.write('localStorage', 'engine.theme', theme);
  const button = byId('theme');
  if (button) button.textContent = `Theme: ${theme}`;
}
// At once and not when the page is complete, so that it is never shown in the other theme.
setTheme(THEMES.find((theme) => theme === stored.read('localStorage', 'engine.theme')) || 'system');

// ---- Requests ---------------------------------------------------------------------------------

/** JSON of an endpoint of the board; an Error whose message is for a person where there is none. */
async function ask(path, query = {}) {
  const words = new URLSearchParams();
  for (const [name, value] of Object.entries(query)) {
    for (const item of [value].flat()) if (item !== '' && item != null) words.append(name, item);
  }
  let answer;
  try {
    answer = await fetch(`api/${path}?${words}`);
  } catch {
    throw new Error('The board does not answer. Is `engine board` still running?');
  }
  const value = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(value.error || `The board answered with status ${answer.status}.`);
  return value;
}

function connection(text, bad = false) {
  const status = byId('connection');
  if (status.textContent !== text) status.textContent = text;
  status.classList.toggle('bad', bad);
}

// ---- Numbers for people -----------------------------------------------------------------------

const count = (value) => Math.round(value).toLocaleString('en');
const short = (value) => {
  if (value === 0) return '0';
  const size = Math.abs(value);
  return size < 1e-3 || size >= 1e5 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
};
const gib = (value) => `${(value / 2 ** 30).toFixed(2)} GiB`;

function duration(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return seconds < 129600 ? `${Math.round(seconds / 3600)} h` : `${Math.round(seconds / 86400)} days`;
}

// ---- Charts -----------------------------------------------------------------------------------

const CHARTS = [
  { key: 'loss', title: 'Loss', unit: 'nats per trained token', told: short, log: true, gaps: true },
  { key: 'eval_perplexity', title: 'Held-out perplexity', unit: '', told: short, log: true, dots: true },
  { key: 'lr', title: 'Learning rate', unit: '', told: short },
  { key: 'tokens_per_second', title: 'Tokens per second', unit: '', told: count, zero: true },
  { key: 'peak_memory_bytes', title: 'Memory', unit: 'peak; dotted: the plan', told: gib, base: 2 ** 30, zero: true, plan: true },
  { key: 'grad_norm', title: 'Gradient norm', unit: '', told: short, log: true },
];
const HEIGHT = 220;
const EDGE = { left: 58, right: 18, top: 10, bottom: 22 };

/** Round values in [low, high], about `wanted` of them. */
function ticks(low, high, wanted, log) {
  if (log) {
    const all = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
      for (const digit of high / low > 1e3 ? [1] : [1, 2, 5]) all.push(digit * 10 ** power);
    }
    const inside = all.filter((value) => value >= low && value <= high);
    if (inside.length > 1) return inside;
  }
  const rough = (high - low) / wanted;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].find((digit) => digit * power >= rough) * power;
  const first = Math.ceil(low / step);
  return Array.from({ length: Math.floor(high / step) - first + 1 }, (_, i) => (first + i) * step);
}

/** The index of the last of ascending `steps` that is not after `step`; -1 before the first. */
function indexAt(steps, step) {
  let low = 0;
  let high = steps.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= step) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}

/** One chart: curves of several runs over the steps, with a cursor that reads their values. */
class Chart {
  constructor(kind) {
    this.kind = kind;
    this.runs = [];
    this.step = null; // where the cursor is; null: at the newest
    this.plot = el('div', {
      class: 'plot', tabindex: '0', role: 'slider', 'aria-label': `${kind.title} by step`,
      onkeydown: (event) => this.key(event),
      onpointermove: (event) => this.point(event),
      onpointerdown: (event) => this.point(event),
      onpointerleave: () => this.read(null),
    });
    this.values = el('table', { class: 'values' });
    const unit = kind.unit ? el('span', { class: 'hint' }, ` ${kind.unit}`) : null;
    this.element = el('section', { class: 'chart', 'data-figure': kind.key, 'aria-label': kind.title },
      el('h3', {}, kind.title, unit), this.plot, this.values);
    new ResizeObserver(() => this.draw()).observe(this.plot);
  }

  /** Draw `runs`: {name, colour, raw, smooth, plan, missing}, points as {steps, values}. */
  set(runs, log) {
    this.log = log && this.kind.log;
    this.runs = runs.filter((run) => run.raw.steps.length > 0 || run.missing.length > 0);
    this.draw();
  }

  range() {
    let [low, high, first, last] = [Infinity, -Infinity, Infinity, -Infinity];
    for (const run of this.runs) {
      const numbers = this.log ? run.raw.values.filter((value) => value > 0) : run.raw.values;
      const plan = this.kind.plan && run.plan ? [run.plan] : [];
      for (const value of [...numbers, ...plan]) {
        low = Math.min(low, value);
        high = Math.max(high, value);
      }
      for (const step of [run.raw.steps[0], run.raw.steps.at(-1), ...run.missing]) {
        if (step === undefined) continue;
        first = Math.min(first, step);
        last = Math.max(last, step);
      }
    }
    if (low > high) [low, high] = [1, 2];
    if (this.kind.zero && !this.log) low = 0;
    if (low === high) [low, high] = this.log ? [low / 2, high * 2] : [low - Math.abs(low) / 2 - 1e-12, high + Math.abs(high) / 2 + 1e-12];
    if (!this.log) high += (high - low) * 0.04;
    return { low, high, first, last: last > first ? last : first + 1 };
  }

  draw() {
    const width = Math.max(this.plot.clientWidth, 200);
    const has = this.runs.length > 0;
    const range = this.range();
    const scale = this.log ? Math.log10 : (value) => value;
    const inner = { width: width - EDGE.left - EDGE.right, height: HEIGHT - EDGE.top - EDGE.bottom };
    this.x = (step) => EDGE.left + ((step - range.first) / (range.last - range.first)) * inner.width;
    this.y = (value) => EDGE.top + inner.height
      * (1 - (scale(value) - scale(range.low)) / (scale(range.high) - scale(range.low)));
    this.stepAt = (x) => range.first + ((x - EDGE.left) / inner.width) * (range.last - range.first);
    this.drawn = svg('svg', { viewBox: `0 0 ${width} ${HEIGHT}`, 'aria-hidden': 'true' });
    if (has) {
      this.axes(range, width, inner);
      this.runs.forEach((run) => this.curves(run, width));
    } else {
      this.drawn.append(svg('text', { x: width / 2, y: HEIGHT / 2, 'text-anchor': 'middle' }, 'Nothing measured yet'));
    }
    this.cursor = svg('g', {});
    this.drawn.append(this.cursor);
    this.plot.replaceChildren(this.drawn);
    this.plot.setAttribute('aria-disabled', String(!has));
    this.read(this.step);
  }

  axes(range, width, inner) {
    const base = this.kind.base ?? 1;
    for (const tick of ticks(range.low / base, range.high / base, 5, this.log)) {
      const y = this.y(tick * base);
      const label = base > 1 ? `${short(tick)} GiB` : this.kind.told(tick);
      this.drawn.append(
        svg('line', { class: 'grid', x1: EDGE.left, x2: width - EDGE.right, y1: y, y2: y }),
        svg('text', { x: EDGE.left - 6, y: y + 4, 'text-anchor': 'end' }, label));
    }
    for (const step of ticks(range.first, range.last, Math.max(2, inner.width / 70), false)) {
      if (!Number.isInteger(step)) continue;
      this.drawn.append(svg('text', { x: this.x(step), y: HEIGHT - 6, 'text-anchor': 'middle' }, count(step)));
    }
  }

  curves(run, width) {
    const path = (points) => points.steps
      .map((step, i) => [step, points.values[i]])
      .filter(([, value]) => !this.log || value > 0)
      .map(([step, value], i) => `${i ? 'L' : 'M'}${this.x(step).toFixed(1)} ${this.y(value).toFixed(1)}`)
      .join('');
    const group = svg('g', { class: run.colour });
    const line = (points, extra) => svg('path', { class: `curve ${extra}`, d: path(points) });
    if (this.kind.plan && run.plan) {
      const y = this.y(run.plan);
      group.append(svg('line', { class: 'plan', x1: EDGE.left, x2: width - EDGE.right, y1: y, y2: y }));
    }
    if (run.smooth) group.append(line(run.raw, 'raw'), line(run.smooth, run.dash));
    else group.append(line(run.raw, run.dash));
    if (this.kind.dots || run.raw.steps.length === 1) {
      run.raw.steps.forEach((step, i) => group.append(
        svg('circle', { class: 'dot', cx: this.x(step), cy: this.y(run.raw.values[i]), r: 3 })));
    }
    if (this.kind.gaps) {
      for (const step of run.missing) {
        const x = this.x(step);
        group.append(svg('path', { class: 'missing', d: `M${x - 4} ${EDGE.top}h8l-4 7z` },
          svg('title', {}, `step ${step}: the loss is not a number`)));
      }
    }
    this.drawn.append(group);
  }

  /** Move the cursor to a step, or to the newest (null), and tell every run's value there. */
  read(step) {
    this.step = step;
    const last = Math.max(...this.runs.map((run) => run.raw.steps.at(-1) ?? 0), 0);
    const at = step ?? last;
    this.cursor.replaceChildren();
    if (step !== null && this.runs.length) {
      this.cursor.append(svg('line', { class: 'cursor', x1: this.x(at), x2: this.x(at), y1: EDGE.top, y2: HEIGHT - EDGE.bottom }));
    }
    const told = [];
    const rows = this.runs.map((run) => {
      const index = indexAt(run.raw.steps, at);
      const known = index >= 0 && (step === null || run.raw.steps[index] >= run.raw.steps[0]);
      let text = '–';
      if (known) {
        text = this.kind.told(run.raw.values[index]);
        if (run.smooth) {
          const smooth = run.smooth.values[indexAt(run.smooth.steps, at)];
          if (smooth !== undefined) text += ` (mean ${this.kind.told(smooth)})`;
        }
        if (this.kind.plan && run.plan) text += `, plan ${gib(run.plan)}`;
        if (step !== null) {
          const { steps, values } = run.raw;
          this.cursor.append(svg('circle', {
            class: `dot ${run.colour}`, cx: this.x(steps[index]), cy: this.y(values[index]), r: 4,
          }));
        }
      }
      told.push(`${run.name} ${text}`);
      return el('tr', {}, el('th', { scope: 'row' }, swatch(run), el('span', {}, run.name)),
        el('td', { class: 'number' }, text));
    });
    const where = this.runs.length ? `${step === null ? 'Newest, step' : 'Step'} ${count(at)}` : '';
    show(this.values, el('caption', {}, where), el('tbody', {}, rows));
    const first = Math.min(...this.runs.map((run) => run.raw.steps[0] ?? 0), last);
    for (const [name, value] of [['min', first], ['max', last], ['now', at], ['text', `${where}: ${told.join(', ')}`]]) {
      this.plot.setAttribute(`aria-value${name}`, value);
    }
  }

  /** The steps that have a point in any run, ascending. */
  steps() {
    return [...new Set(this.runs.flatMap((run) => run.raw.steps))].sort((a, b) => a - b);
  }

  point(event) {
    if (!this.runs.length) return;
    const wanted = this.stepAt(event.clientX - this.plot.getBoundingClientRect().left);
    const steps = this.steps();
    const index = Math.max(0, indexAt(steps, wanted));
    const next = steps[Math.min(index + 1, steps.length - 1)];
    this.read(Math.abs(next - wanted) < Math.abs(steps[index] - wanted) ? next : steps[index]);
  }

  key(event) {
    const steps = this.steps();
    const index = indexAt(steps, this.step ?? Infinity);
    const by = event.shiftKey ? 10 : 1;
    const target = { ArrowLeft: index - by, ArrowDown: index - by, ArrowRight: index + by, ArrowUp: index + by, Home: 0, End: steps.length - 1 }[event.key];
    if (event.key === 'Escape') this.read(null);
    else if (target === undefined || !steps.length) return;
    else this.read(steps[Math.min(Math.max(target, 0), steps.length - 1)]);
    event.preventDefault();
  }
}

/** A short piece of a run's line, for lists. */
function swatch(run) {
  return svg('svg', { class: `swatch ${run ? run.colour : ''}`, viewBox: '0 0 26 10', 'aria-hidden': 'true' },
    svg('line', { x1: 0, x2: 26, y1: 5, y2: 5, class: run ? run.dash : '' }));
}

// ---- The board --------------------------------------------------------------------------------

const VIEWS = ['charts', 'settings', 'samples', 'rows', 'pruning', 'forge'];
const COLOURS = 8;
const EVERY = 2000;

const board = {
  runs: [],
  chosen: new Map(), // id -> slot of its colour and dash
  series: new Map(), // id -> {version, points}
  plans: new Map(),
  rows: null, // the rows that are shown: {version, total, rows}
  charts: CHARTS.map((kind) => new Chart(kind)),
  view: 'charts',
  first: true,
};

const look = (slot) => ({ colour: `run-${slot % COLOURS}`, dash: `dash-${Math.floor(slot / COLOURS) % 4}` });
const chosenRuns = () => board.runs.filter((run) => board.chosen.has(run.id));
const runWith = (id) => board.runs.find((run) => run.id === id);

function choose(id, on) {
  if (on && !board.chosen.has(id)) {
    const taken = new Set(board.chosen.values());
    let slot = 0;
    while (taken.has(slot)) slot++;
    board.chosen.set(id, slot);
  } else if (!on) board.chosen.delete(id);
  stored.write('sessionStorage', 'engine.board.chosen', JSON.stringify([...board.chosen.keys()]));
}

/** Which runs are shown at first: those of this tab's last visit, else the newest three. */
function chooseFirst() {
  let ids = [];
  try { ids = JSON.parse(stored.read('sessionStorage', 'engine.board.chosen')) || []; } catch { /* none */ }
  ids = ids.filter(runWith);
  if (!ids.length) {
    const drawn = board.runs.filter((run) => run.steps > 0);
    ids = drawn.sort((a, b) => b.updated - a.updated).slice(0, 3).map((run) => run.id);
    ids = board.runs.map((run) => run.id).filter((id) => ids.includes(id));
  }
  ids.forEach((id) => choose(id, true));
}

function runFacts(run) {
  const { loss, heldout_perplexity: after, heldout_perplexity_before: before, eta_seconds: eta } = run.figures;
  const facts = [];
  if (run.verb !== 'train') facts.push(run.verb);
  if (run.total_steps) facts.push(`step ${count(run.step)} of ${count(run.total_steps)}`);
  else if (run.steps) facts.push(`step ${count(run.step)}`);
  if (loss !== undefined) facts.push(`loss ${short(loss)}`);
  if (after !== undefined) facts.push(`held-out ${before === undefined ? '' : `${short(before)} → `}${short(after)}`);
  if (run.figures.skipped) facts.push(`${run.figures.skipped} steps skipped`);
  if (run.state === 'running' && eta !== undefined) facts.push(`${duration(eta)} left`);
  else if (run.updated) facts.push(`${duration(Math.max(0, Date.now() / 1000 - run.updated))} ago`);
  return facts.join(' · ');
}

/** The entry of a run in the list; made once and changed in place, so that focus stays. */
function runEntry(run) {
  const entry = el('li', { 'data-id': run.id },
    el('label', {},
      el('input', { type: 'checkbox', onchange: (event) => { choose(run.id, event.target.checked); refresh(); } }),
      el('span', { class: 'mark' }), el('span', { class: 'name' }), el('span', { class: 'badge' })),
    el('progress', { max: 1, hidden: true }),
    el('div', { class: 'facts' }),
    el('p', { class: 'error', hidden: true }));
  return entry;
}

function fillEntry(entry, run) {
  const part = (selector) => entry.querySelector(selector);
  const slot = board.chosen.get(run.id);
  part('input').checked = slot !== undefined;
  part('.mark').replaceChildren(swatch(slot === undefined ? null : look(slot)));
  part('.name').textContent = run.name;
  part('.name').title = run.folder;
  part('.badge').textContent = run.state;
  part('.badge').className = `badge ${run.state.split(' ')[0]}`;
  part('.facts').textContent = runFacts(run);
  const bar = part('progress');
  bar.hidden = !(run.state === 'running' && run.total_steps);
  bar.value = run.total_steps ? run.step / run.total_steps : 0;
  bar.setAttribute('aria-label', `Progress of ${run.name}`);
  const error = runError(run);
  part('.error').hidden = !error;
  part('.error').textContent = error;
}

function runError(run) {
  if (run.state === 'failed') return run.error || 'It failed and left no reason.';
  if (run.state !== 'died') return '';
  const next = run.verb === 'train' ? ` engine resume ${run.folder} goes on from its last checkpoint.` : '';
  return `Its process ended without a word: killed, or lost with the machine.${next}`;
}

function listRuns() {
  const list = byId('run-list');
  const wanted = byId('filter').value.trim().toLowerCase();
  const shown = board.runs.filter((run) => `${run.name} ${run.state} ${run.verb}`.toLowerCase().includes(wanted));
  const entries = new Map([...list.children].map((entry) => [entry.dataset.id, entry]));
  shown.forEach((run, index) => {
    const entry = entries.get(run.id) || runEntry(run);
    fillEntry(entry, run);
    if (list.children[index] !== entry) list.insertBefore(entry, list.children[index] || null);
  });
  while (list.children.length > shown.length) list.lastChild.remove();
  const empty = byId('runs-empty');
  empty.hidden = shown.length > 0;
  empty.textContent = board.runs.length
    ? 'No run has this in its name or state.'
    : `There are no runs in ${board.folders.join(', ')} yet. The list looks again every two seconds.`;
}

/** Read a run's series again if it has changed since, or other points are asked for. */
async function readSeries(run) {
  const query = { run: run.id, smoothing: byId('smoothing').value, first: byId('first-step').value, last: byId('last-step').value };
  const version = JSON.stringify([run.steps, run.step, run.updated, query]);
  if (board.series.get(run.id)?.version === version) return;
  board.series.set(run.id, { version, points: await ask('series', query) });
}

/** Ask for a run's planned memory, once; it takes seconds and arrives when it is there. */
function readPlan(run) {
  if (board.plans.has(run.id)) return;
  board.plans.set(run.id, run.figures.planned_peak_bytes ?? null);
  if (run.figures.planned_peak_bytes === undefined) {
    ask('plan', { run: run.id })
      .then((plan) => { board.plans.set(run.id, plan.bytes); drawCharts(); })
      .catch(() => {}); // no plan is no fault: the curve stands without its line
  }
}

function drawCharts() {
  const shown = chosenRuns().filter((run) => board.series.has(run.id) && run.steps > 0);
  byId('charts-empty').hidden = shown.length > 0;
  byId('charts-body').hidden = shown.length === 0;
  for (const chart of board.charts) {
    const { key } = chart.kind;
    chart.set(shown.map((run) => {
      const { figures, not_finite: missing } = board.series.get(run.id).points;
      const raw = key === 'eval_perplexity' ? heldout(run, figures[key]) : figures[key];
      return {
        name: run.name, ...look(board.chosen.get(run.id)), raw, smooth: figures[`${key}_smooth`],
        plan: board.plans.get(run.id), missing: chart.kind.gaps ? missing.steps : [],
      };
    }), byId('log-scale').checked);
  }
}

/** Perplexities of the held-out rows, with those before the first step and after the last. */
function heldout(run, { steps, values }) {
  const { heldout_perplexity_before: before, heldout_perplexity: after } = run.figures;
  const whole = !byId('first-step').value && !byId('last-step').value;
  const first = whole && before !== undefined && steps[0] !== 0 ? [[0, before]] : [];
  const last = whole && after !== undefined && run.state === 'finished' && steps.at(-1) !== run.step ? [[run.step, after]] : [];
  const points = [...first, ...steps.map((step, i) => [step, values[i]]), ...last];
  return { steps: points.map(([step]) => step), values: points.map(([, value]) => value) };
}

async function showCharts() {
  const runs = chosenRuns().filter((run) => run.steps > 0);
  await Promise.all(runs.map(readSeries));
  runs.forEach(readPlan);
  drawCharts();
  const damaged = runs.filter((run) => board.series.get(run.id).points.damaged > 0);
  return damaged.map((run) => `${run.name}: ${board.series.get(run.id).points.damaged} damaged lines in metrics.jsonl were left out.`);
}

async function showSettings() {
  const runs = chosenRuns().filter((run) => run.has.includes('settings'));
  const target = byId('settings-body');
  if (!runs.length) return show(target, empty('Choose runs in the list to see their settings side by side.'));
  const { rows } = await ask('settings', { run: runs.map((run) => run.id) });
  const only = byId('only-differing').checked && runs.length > 1;
  const shown = rows.filter((row) => !only || row.differs);
  if (!shown.length) return show(target, empty('The chosen runs have the same settings.'));
  return show(target, el('table', { class: 'plain', 'aria-label': 'Settings' },
    el('thead', {}, el('tr', {}, el('th', { scope: 'col' }, 'setting'), runs.map((run) => el('th', { scope: 'col' }, run.name)))),
    el('tbody', {}, shown.map((row) => el('tr', { class: row.differs && runs.length > 1 ? 'differs' : null },
      el('th', { scope: 'row' }, row.name),
      runs.map((run) => el('td', {}, row.values[run.id] ?? '–')))))));
}

const empty = (text, bad = false) => el('p', { class: bad ? 'empty error' : 'empty' }, text);

/** Fill a view's list of runs; the run that is chosen there, or undefined. */
function selected(view) {
  const select = document.querySelector(`select[data-run="${view}"]`);
  const runs = board.runs.filter((run) => run.has.includes(view));
  const before = select.value;
  show(select, runs.map((run) => el('option', { value: run.id }, run.name)));
  const chosen = runs.find((run) => run.id === before) || runs.find((run) => board.chosen.has(run.id)) || runs[0];
  if (chosen) select.value = chosen.id;
  select.disabled = !chosen;
  return chosen;
}

async function showSamples() {
  const run = selected('samples');
  const target = byId('samples-body');
  if (!run) return show(target, empty('No run here has samples: answers to the same prompts, written to samples.jsonl while a run trains, or by engine forge.'));
  const { prompts } = await ask('samples', { run: run.id });
  if (!prompts.length) return show(target, empty('This run has written no samples yet.'));
  return show(target, prompts.map(({ prompt, answers }) => el('article', { class: 'card' },
    el('h3', { class: 'text' }, prompt),
    el('div', { class: 'answers' }, answers.map(({ label, text }) => el('div', {},
      el('div', { class: 'hint' }, label), el('pre', {}, text || '(empty)')))))));
}

async function showRows() {
  const run = selected('rows');
  const target = byId('rows-body');
  byId('row-before').disabled = byId('row-after').disabled = !run;
  if (!run) return show(target, empty('No run here has rows to show.'));
  const number = Math.max(1, Math.floor(Number(byId('row').value)) || 1);
  const asked = { run: run.id, part: byId('part').value, first: number };
  const version = JSON.stringify(asked);
  if (board.rows?.version !== version) {
    if (!target.childNodes.length) show(target, empty('Reading the rows and the tokenizer…'));
    board.rows = { version, ...(await ask('rows', asked)) }; // rows do not change while a run goes on
  }
  const { total, rows } = board.rows;
  byId('row-before').disabled = number <= 1;
  byId('row-after').disabled = number >= total;
  byId('row').max = Math.max(total, 1);
  if (!total) return show(target, empty('This run holds out no rows.'));
  if (!rows.length) return show(target, empty(`There are ${count(total)} rows; choose a smaller number.`));
  return show(target, rows.map((row) => el('article', { class: 'card' },
    el('h3', {}, `Row ${count(number)} of ${count(total)}`),
    el('p', { class: 'hint' }, row.source, row.error ? '' : ` · ${count(row.tokens)} tokens, ${count(row.trained_tokens)} trained on`),
    row.error ? el('p', { class: 'error' }, row.error)
      : el('pre', {}, row.stretches.map(({ trained, text }) => el('mark', { class: trained ? 'trained' : null }, text))),
    row.cut ? el('p', { class: 'hint' }, 'The row goes on; only its first 20,000 characters are shown.') : null)));
}

function heatMap(map) {
  const width = Math.max(...map.layers.map((layer) => layer.scores.length));
  const rows = map.layers.map(({ layer, scores, pruned, pruned_before: before }) => {
    const known = scores.filter((score) => score !== null);
    const [low, high] = [Math.min(...known), Math.max(...known)];
    return el('tr', {}, el('th', { scope: 'row' }, `layer ${layer}`), Array.from({ length: width }, (_, head) => {
      const score = scores[head];
      if (score === undefined) return el('td', {});
      if (before.includes(head)) return el('td', { title: `layer ${layer}, head ${head}: pruned before` }, '–');
      const gone = pruned.includes(head);
      const text = score === null ? '?' : short(score);
      const cell = el('td', { class: gone ? 'number pruned' : 'number', title: `layer ${layer}, head ${head}: ${text}${gone ? ', pruned' : ''}` },
        gone ? el('span', { class: 'cross' }, '× ') : null, text);
      if (score !== null && high > low) cell.style.setProperty('--share', ((score - low) / (high - low)).toFixed(3));
      return cell;
    }));
  });
  const removed = map.layers.reduce((sum, layer) => sum + layer.pruned.length, 0);
  const how = [map.metric && `by ${map.metric}`, map.mode && `mode ${map.mode}`, `${removed} heads pruned`].filter(Boolean).join(', ');
  return el('div', { class: 'wide card', tabindex: '0', role: 'region', 'aria-label': `Importance of heads of ${map.name}` },
    el('table', { class: 'heat' }, el('caption', {}, `${map.name}: ${how}`),
      el('thead', {}, el('tr', {}, el('td', {}), Array.from({ length: width }, (_, head) => el('th', { scope: 'col' }, head)))),
      el('tbody', {}, rows)));
}

async function showPruning() {
  const run = selected('pruning');
  const target = byId('pruning-body');
  if (!run) return show(target, empty('No model here was pruned. engine prune and engine forge write pruning.json, which is shown here.'));
  const { maps } = await ask('pruning', { run: run.id });
  if (!maps.length) return show(target, empty('No pruned model is in this job\'s directory: engine forge --keep-pruned leaves them there.'));
  if (target.dataset.shown !== JSON.stringify(maps)) target.replaceChildren(...maps.map(heatMap));
  target.dataset.shown = JSON.stringify(maps);
  return undefined;
}

async function showForge() {
  const run = selected('forge');
  const target = byId('forge-body');
  if (!run) return show(target, empty('No job of engine forge is here.'));
  const { models } = await ask('forge', { run: run.id });
  if (!models.length) return show(target, empty('This job has judged no model yet.'));
  const base = models[0].perplexity;
  const worst = Math.max(...models.map((model) => model.perplexity ?? 0));
  const told = (value, text) => el('td', { class: 'number' }, value === null ? '–' : text(value));
  const rows = models.map((model) => {
    const bar = el('span', { class: 'bar' });
    bar.style.width = `${(100 * (model.perplexity ?? worst)) / worst}%`;
    return el('tr', {}, el('th', { scope: 'row' }, model.name),
      el('td', { class: 'number' }, model.perplexity === null ? 'infinite' : short(model.perplexity), bar),
      told(model.perplexity && base ? model.perplexity / base - 1 : null, (value) => `${value >= 0 ? '+' : ''}${(100 * value).toFixed(1)} %`),
      told(model.pruned_heads, count), told(model.parameters, count), told(model.bytes, gib), told(model.tokens_per_second, (value) => value.toFixed(1)));
  });
  const heads = ['model', 'perplexity', 'change', 'pruned heads in it', 'parameters', 'on disk', 'tokens/s'];
  return show(target, el('div', { class: 'wide', tabindex: '0', role: 'region', 'aria-label': 'Judged models' },
    el('table', { class: 'plain' }, el('caption', {}, `${run.name}: held-out perplexity of each model, in order`),
      el('thead', {}, el('tr', {}, heads.map((head) => el('th', { scope: 'col' }, head)))), el('tbody', {}, rows))));
}

const SHOWN_BY = { charts: showCharts, settings: showSettings, samples: showSamples, rows: showRows, pruning: showPruning, forge: showForge };

/** Draw the list and the view that is open from what is known; errors are told where they belong. */
async function refresh() {
  listRuns();
  const { view } = board;
  try {
    const notes = await SHOWN_BY[view]();
    if (Array.isArray(notes) && notes.length) return connection(notes.join(' '), true);
  } catch (error) {
    if (view === 'charts') return connection(error.message, true);
    show(byId(`${view}-body`), empty(error.message, true));
  }
  const running = board.runs.filter((run) => run.state === 'running').length;
  return connection(`${count(board.runs.length)} runs, ${running} running`);
}

/** Ask for the runs, draw, and do so again after a while, less often when nothing runs. */
async function watch() {
  try {
    if (!document.hidden || board.first) {
      const answer = await ask('runs');
      const rank = (run) => (run.state === 'running' ? 0 : 1);
      board.runs = answer.runs.sort((a, b) => rank(a) - rank(b)); // otherwise by path, as they come
      board.folders = answer.folders;
      if (board.first) chooseFirst();
      board.first = false;
      await refresh();
    }
  } catch (error) {
    connection(error.message, true);
  }
  setTimeout(watch, EVERY);
}

function openView() {
  const named = location.hash.slice(1);
  board.view = VIEWS.includes(named) ? named : 'charts';
  for (const view of VIEWS) byId(`view-${view}`).hidden = view !== board.view;
  for (const link of document.querySelectorAll('.views a')) {
    if (link.hash === `#${board.view}`) link.setAttribute('aria-current', 'page');
    else link.removeAttribute('aria-current');
  }
  if (!board.first) refresh();
}

function startBoard() {
  board.folders = [];
  byId('charts-body').append(...board.charts.map((chart) => chart.element));
  byId('choose-none').addEventListener('click', () => { [...board.chosen.keys()].forEach((id) => choose(id, false)); refresh(); });
  byId('filter').addEventListener('input', listRuns);
  byId('smoothing').addEventListener('input', () => { byId('smoothing-shown').textContent = byId('smoothing').value; });
  const later = debounced(refresh);
  for (const id of ['smoothing', 'first-step', 'last-step', 'log-scale', 'only-differing', 'part', 'row']) byId(id).addEventListener('input', later);
  for (const form of document.querySelectorAll('form')) form.addEventListener('submit', (event) => event.preventDefault());
  for (const select of document.querySelectorAll('select[data-run]')) select.addEventListener('change', refresh);
  const turn = (by) => () => { byId('row').value = Math.max(1, Number(byId('row').value) + by); refresh(); };
  byId('row-before').addEventListener('click', turn(-1));
  byId('row-after').addEventListener('click', turn(1));
  addEventListener('hashchange', openView);
  document.addEventListener('visibilitychange', () => { if (!document.hidden && !board.first) refresh(); });
  openView();
  watch();
}

// ---- The chat ---------------------------------------------------------------------------------

const chat = { panes: [], key: stored.read('sessionStorage', 'engine.chat.key') };

class Refused extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/** A request to the server with the key, if there is one; a Refused with its reason otherwise. */
async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (chat.key) headers.Authorization = `Bearer ${chat.key}`;
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new Refused('The server does not answer. Is `engine serve` still running?', 0);
  }
  if (answer.ok) return answer;
  const value = await answer.json().catch(() => ({}));
  throw new Refused(value.error?.message || `The server answered with status ${answer.status}.`, answer.status);
}

/** The JSON objects of a stream of server-sent events, until `[DONE]` or its end. */
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = '';
  for (;;) {
    const { value, done } = await reader.read();
    buffer += value ?? '';
    const lines = buffer.split(/\r?\n/);
    buffer = done ? '' : lines.pop();
    for (const line of lines) {
      const data = line.startsWith('data:') ? line.slice(5).trim() : '';
      if (data === '[DONE]') return;
      if (data) yield JSON.parse(data);
    }
    if (done) throw new Refused('The connection ended before the answer did.', 0);
  }
}

function askForKey(refused) {
  byId('key-form').hidden = false;
  byId('key-why').textContent = chat.key
    ? `The server did not accept the key: ${refused.message}`
    : 'This server asks for an API key. It is kept in this tab only and sent to no one else.';
  connection('An API key is needed.', true);
  byId('key').focus();
}

/** One conversation with one model. */
class Pane {
  constructor(element) {
    this.element = element;
    this.select = element.querySelector('select');
    this.log = element.querySelector('.transcript');
    this.history = [];
    this.abort = null;
    this.waiting = new Map(); // text of the answer's parts that is not on the page yet
    this.frame = 0;
    this.clear();
  }

  clear() {
    this.abort?.abort();
    this.history = [];
    this.log.replaceChildren(el('p', { class: 'hint' }, 'Nothing was said yet.'));
  }

  models(names, first) {
    const side = this.element.dataset.side;
    const none = side === 'right' ? [el('option', { value: '' }, 'none: one conversation')] : [];
    this.select.replaceChildren(...none, ...names.map((name) => el('option', { value: name }, name)));
    this.select.value = first ?? '';
  }

  get model() { return this.select.value; }

  say(role, who, words = '') {
    if (!this.history.length && !this.log.querySelector('.said')) this.log.replaceChildren();
    const text = el('pre', { class: 'text' }, words);
    const below = el('div', { class: 'below' });
    const said = el('article', { class: `said ${role}` }, el('div', { class: 'who' }, who), text, role === 'assistant' ? below : null);
    this.append(() => this.log.append(said));
    if (role === 'user') this.log.scrollTop = this.log.scrollHeight;
    return { said, text, below };
  }

  /** Change the transcript; it scrolls along only for somebody who reads its end. */
  append(change) {
    const atEnd = this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 40;
    change();
    if (atEnd) this.log.scrollTop = this.log.scrollHeight;
  }

  async send(message, settings) {
    this.say('user', 'You', message);
    this.history.push({ role: 'user', content: message });
    await this.answer(settings);
  }

  /** Stream the answer to what was said last. What came before a stop or a fault stays. */
  async answer(settings) {
    const shown = this.say('assistant', this.model);
    const { system, ...others } = settings;
    const messages = system ? [{ role: 'system', content: system }, ...this.history] : this.history;
    const body = { model: this.model, messages, stream: true, stream_options: { include_usage: true }, ...others };
    const abort = new AbortController();
    this.abort = abort;
    this.log.setAttribute('aria-busy', 'true'); // told when it is whole, not token by token
    const began = performance.now();
    const told = { text: '', finish: null, tokens: null };
    let note = '';
    try {
      const answer = await request('v1/chat/completions', {
        method: 'POST', signal: abort.signal, body: JSON.stringify(body), headers: { 'Content-Type': 'application/json' },
      });
      for await (const event of events(answer)) this.take(event, told, shown);
      if (told.finish === 'length') note = 'Cut: raise “Most tokens” for more.';
    } catch (error) {
      if (error.name === 'AbortError') note = 'Stopped.';
      else this.failed(error, shown, settings);
    }
    this.flush(shown);
    this.log.setAttribute('aria-busy', 'false');
    this.abort = null;
    if (told.text) this.history.push({ role: 'assistant', content: told.text });
    const seconds = (performance.now() - began) / 1000;
    if (told.tokens) note = `${count(told.tokens)} tokens, ${(told.tokens / seconds).toFixed(1)} tokens/s. ${note}`;
    this.append(() => shown.below.prepend(...(told.text ? [copyButton(told)] : []), ...(note ? [el('span', { class: 'hint' }, note)] : [])));
  }

  take(event, told, shown) {
    if (event.error) throw new Refused(event.error.message || 'The server gave up.', 0);
    told.tokens = event.usage?.completion_tokens ?? told.tokens;
    const choice = event.choices?.[0];
    if (!choice) return;
    told.finish = choice.finish_reason ?? told.finish;
    const { content, reasoning_content: reasoning, tool_calls: calls } = choice.delta || {};
    const called = (calls ?? []).map((call) => `${call.function?.name ?? ''}${call.function?.arguments ?? ''}`).join('');
    told.text += content ?? '';
    this.write(shown, { Text: content, Reasoning: reasoning, 'Calls of tools': called });
  }

  /** Append to parts of an answer, once a frame however fast the tokens come. */
  write(shown, texts) {
    for (const [part, text] of Object.entries(texts)) {
      if (text) this.waiting.set(part, (this.waiting.get(part) ?? '') + text);
    }
    if (this.waiting.size && !this.frame) this.frame = requestAnimationFrame(() => this.flush(shown));
  }

  flush(shown) {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    this.append(() => {
      for (const [part, text] of this.waiting) (part === 'Text' ? shown.text : this.aside(shown, part)).append(text);
    });
    this.waiting.clear();
  }

  /** A part of an answer that is folded away. */
  aside(shown, title) {
    let part = shown.said.querySelector(`[data-part="${title}"]`);
    if (!part) {
      part = el('details', { 'data-part': title }, el('summary', {}, title), el('pre', { class: 'text' }));
      shown.text.before(part);
    }
    return part.querySelector('pre');
  }

  failed(error, shown, settings) {
    if (error.status === 401 || error.status === 403) askForKey(error);
    const again = el('button', {
      type: 'button', class: 'small',
      onclick: () => { shown.said.remove(); whileAnswering([this.answer(settings)]); },
    }, 'Try again');
    this.append(() => shown.below.append(el('span', { class: 'error' }, error.message), again));
  }
}

function copyButton(told) {
  const button = el('button', { type: 'button', class: 'small' }, 'Copy');
  button.addEventListener('click', async () => {
    try {
      await navigator.clipboard.writeText(told.text);
      button.textContent = 'Copied';
    } catch {
      button.textContent = 'Select and copy by hand';
    }
  });
  return button;
}

function answerSettings() {
  const settings = { system: byId('system').value.trim() };
  for (const [id, name] of [['temperature', 'temperature'], ['max-tokens', 'max_tokens'], ['seed', 'seed']]) {
    if (byId(id).value !== '') settings[name] = Number(byId(id).value);
  }
  return settings;
}

async function whileAnswering(answers) {
  byId('send').disabled = true;
  byId('stop').disabled = false;
  await Promise.allSettled(answers);
  const busy = chat.panes.some((pane) => pane.abort);
  byId('send').disabled = busy;
  byId('stop').disabled = !busy;
  if (!busy && document.activeElement === document.body) byId('message').focus();
}

function sendMessage(event) {
  event.preventDefault();
  const message = byId('message').value.trim();
  if (!message || byId('send').disabled || !byId('chat-controls').reportValidity()) return;
  byId('message').value = '';
  const settings = answerSettings();
  whileAnswering(chat.panes.filter((pane) => pane.model).map((pane) => pane.send(message, settings)));
}

async function readModels() {
  try {
    const answer = await request('v1/models');
    const names = (await answer.json()).data.map((model) => model.id);
    chat.panes[0].models(names, names[0]);
    chat.panes[1].models(names, names[1]);
    byId('key-form').hidden = true;
    byId('send').disabled = false;
    connection(names.length === 1 ? 'One model' : `${names.length} models`);
  } catch (error) {
    byId('send').disabled = true;
    if (error.status === 401 || error.status === 403) askForKey(error);
    else {
      connection(error.message, true);
      setTimeout(readModels, 3000);
    }
  }
}

function startChat() {
  chat.panes = [...document.querySelectorAll('.pane')].map((element) => new Pane(element));
  byId('composer').addEventListener('submit', sendMessage);
  byId('chat-controls').addEventListener('submit', (event) => event.preventDefault());
  byId('message').addEventListener('keydown', (event) => {
    if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) sendMessage(event);
  });
  byId('stop').addEventListener('click', () => chat.panes.forEach((pane) => pane.abort?.abort()));
  byId('clear').addEventListener('click', () => { chat.panes.forEach((pane) => pane.clear()); byId('message').focus(); });
  byId('key-form').addEventListener('submit', (event) => {
    event.preventDefault();
    chat.key = byId('key').value.trim();
    byId('key').value = '';
    stored.write('sessionStorage', 'engine.chat.key', chat.key);
    readModels().then(() => { if (byId('key-form').hidden) byId('message').focus(); });
  });
  readModels();
}

// ---- Start ------------------------------------------------------------------------------------

document.addEventListener('DOMContentLoaded', () => {
  setTheme(document.documentElement.dataset.theme);
  byId('theme').addEventListener('click', () => {
    setTheme(THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length]);
  });
  ({ board: startBoard, chat: startChat })[document.body.dataset.page]();
});
