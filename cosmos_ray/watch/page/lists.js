// The lists: episodes by filter, the value function by bin, pairs of two arms.
import { clock, el, frame, get, legend, percent, svg, text, title } from '/draw.js';
import { play } from '/player.js';

const NAMES = ['source', 'task', 'outcome', 'arm', 'version'];
export const asked = { page: 0 };

export function thumb(e, words) {
  const picture =
    e.frame === null
      ? el('span', { className: 'blank' }, 'no picture')
      : el('img', { loading: 'lazy', alt: '', src: `/api/episodes/${encodeURIComponent(e.name)}/frames/-1/${e.frame}` });
  return el(
    'button',
    { className: 'thumb', onclick: () => play([e.name]) },
    picture,
    el('span', { className: e.outcome }, `${e.outcome}, ${e.length} steps`),
    el('span', {}, words ?? `${e.task} · seed ${e.seed}`),
    el('span', { className: 'muted' }, `${e.arm || e.source}${e.version >= 0 ? ` · v${e.version}` : ''}`),
    el('span', { className: 'muted' }, e.created ? clock(e.created) : ''),
  );
}

function query(more = {}) {
  const all = new URLSearchParams();
  for (const [key, value] of Object.entries({ ...asked, ...more }))
    if (value !== '' && value !== null && value !== undefined) all.set(key, value);
  return all;
}

export async function drawEpisodes(place) {
  const held = await get(`/api/episodes?${query()}`);
  asked.page = held.page;
  const again = () => drawEpisodes(place).catch((error) => place.replaceChildren(el('p', { role: 'alert' }, error.message)));
  const filters = el(
    'div',
    { className: 'filters' },
    ...NAMES.map((name) =>
      select(name, held.choices[name], asked[name] ?? '', (value) => {
        asked[name] = value;
        asked.page = 0;
        again();
      }),
    ),
  );
  if (asked.low !== undefined)
    filters.append(
      el(
        'button',
        {
          onclick: () => {
            delete asked.low;
            delete asked.high;
            asked.page = 0;
            again();
          },
        },
        `value ${percent(asked.low)} to ${percent(asked.high)} ×`,
      ),
    );
  const turn = (by) => {
    asked.page += by;
    again();
  };
  const pager = el(
    'p',
    {},
    el('button', { disabled: !held.page, onclick: () => turn(-1) }, 'Newer'),
    ` page ${held.page + 1} of ${held.pages} `,
    el('button', { disabled: held.page + 1 >= held.pages, onclick: () => turn(1) }, 'Older'),
    ` ${held.total} episodes`,
    held.unread ? `; arms of ${held.unread} are still being read` : '',
  );
  const focused = document.activeElement?.getAttribute?.('aria-label');
  place.replaceChildren(
    filters,
    pager,
    held.total ? el('div', { className: 'thumbs' }, ...held.episodes.map((e) => thumb(e))) : el('p', {}, 'No episode is like that.'),
  );
  if (focused) place.querySelector(`select[aria-label="${CSS.escape(focused)}"]`)?.focus();
}

function select(name, values, chosen, changed) {
  const box = el(
    'select',
    { 'aria-label': name, onchange: () => changed(box.value) },
    el('option', { value: '' }, 'all'),
    ...values.map((value) => el('option', { value: String(value), selected: String(value) === String(chosen) }, String(value))),
  );
  return el('label', {}, name, box);
}

const valued = { source: 'eval' };

export async function drawValue(place, open) {
  const [held, listed] = await Promise.all([get(`/api/value?${new URLSearchParams(valued)}`), get('/api/episodes?page=0')]);
  const again = () => drawValue(place, open);
  const filters = el(
    'div',
    { className: 'filters' },
    ...NAMES.map((name) =>
      select(name, listed.choices[name], valued[name] ?? '', (value) => {
        if (value) valued[name] = value;
        else delete valued[name];
        again();
      }),
    ),
  );
  const say = el(
    'p',
    {},
    `${held.decisions} decisions of ${held.episodes} episodes`,
    held.auc === null ? '' : `; AUC ${held.auc.toFixed(2)}`,
    held.brier === null ? '' : `; Brier score ${held.brier.toFixed(3)}`,
    held.unread ? `; ${held.unread} episodes are still being read` : '',
  );
  if (!held.decisions) {
    place.replaceChildren(filters, say);
    return;
  }
  const list = (low, high) => open({ ...valued, low, high, page: 0 });
  place.replaceChildren(
    filters,
    say,
    el(
      'div',
      { className: 'grid' },
      el(
        'div',
        { className: 'card' },
        el('h2', {}, 'Calibration'),
        calibration(held.calibration, list),
        el(
          'p',
          { className: 'muted' },
          'Share of decisions in episodes that succeeded, by predicted value. Choose a bin to list its episodes.',
        ),
      ),
      el(
        'div',
        { className: 'card' },
        el('h2', {}, 'Histogram'),
        histogram(held.histogram, list),
        legend([
          ['green', 'succeeded'],
          ['red', 'failed'],
        ]),
      ),
    ),
  );
}

function hit(f, low, high, words, list) {
  const act = () => list(low, high);
  return svg(
    'rect',
    {
      class: 'hit',
      x: f.sx(low),
      width: f.sx(high) - f.sx(low),
      y: f.top,
      height: f.bottom - f.top,
      tabindex: 0,
      role: 'button',
      'aria-label': words,
      onclick: act,
      onkeydown: (event) => {
        if (event.key === 'Enter' || event.key === ' ') {
          event.preventDefault();
          act();
        }
      },
    },
    title(words),
  );
}

function calibration(rows, list) {
  const f = frame('Calibration of the value', [0, 1], [0, 1], percent, percent, 260);
  f.drawing.setAttribute('role', 'group');
  f.drawing.append(svg('path', { d: `M${f.sx(0)} ${f.sy(0)}L${f.sx(1)} ${f.sy(1)}`, stroke: 'var(--muted)', 'stroke-dasharray': '4 4' }));
  for (const row of rows) {
    const x = f.sx(row.predicted);
    f.drawing.append(
      svg('path', { d: `M${x} ${f.sy(row.wilson[0])}V${f.sy(row.wilson[1])}`, stroke: 'var(--blue)', 'stroke-width': 2 }),
      svg('circle', { cx: x, cy: f.sy(row.success_share), r: 4, fill: 'var(--blue)' }),
      text(x + 5, f.sy(row.success_share) - 5, String(row.count)),
      hit(
        f,
        row.low,
        row.high,
        `values ${percent(row.low)} to ${percent(row.high)}: ${row.count} decisions, ${percent(row.success_share)} in successes`,
        list,
      ),
    );
  }
  return f.drawing;
}

function histogram(counts, list) {
  const n = counts.success.length,
    most = Math.max(1, ...counts.success.map((c, i) => c + counts.failure[i]));
  const f = frame('Histogram of predicted values', [0, 1], [0, most], percent, String, 260);
  f.drawing.setAttribute('role', 'group');
  for (let i = 0; i < n; i += 1) {
    const [won, lost] = [counts.success[i], counts.failure[i]],
      x = f.sx(i / n) + 1,
      width = f.sx((i + 1) / n) - f.sx(i / n) - 2;
    const bar = (low, high, colour) => svg('rect', { x, width, y: f.sy(high), height: f.sy(low) - f.sy(high), fill: `var(--${colour})` });
    f.drawing.append(
      bar(0, won, 'green'),
      bar(won, won + lost, 'red'),
      hit(f, i / n, (i + 1) / n, `values ${percent(i / n)} to ${percent((i + 1) / n)}: ${won} in successes, ${lost} in failures`, list),
    );
  }
  return f.drawing;
}

const pair = { a: '', b: '', show: '' };

export async function drawCompare(place) {
  const held = await get('/api/groups');
  if (held.groups.length < 2) {
    place.replaceChildren(
      el('p', {}, held.unread ? 'The episodes are still being read.' : 'Two evaluated arms are needed: run `evaluate`.'),
    );
    return;
  }
  const known = held.groups.map((g) => g.id);
  if (!known.includes(pair.a)) pair.a = known[0];
  if (!known.includes(pair.b)) pair.b = known.at(-1);
  const again = () => drawCompare(place);
  const choose = (which, words) => {
    const box = el(
      'select',
      {
        'aria-label': words,
        onchange: () => {
          pair[which] = box.value;
          again();
        },
      },
      ...held.groups.map((g) =>
        el('option', { value: g.id, selected: g.id === pair[which] }, `${g.arm}, v${g.version}: ${g.successes} of ${g.episodes}`),
      ),
    );
    return el('label', {}, words, box);
  };
  const c = await get(`/api/compare?${new URLSearchParams({ a: pair.a, b: pair.b })}`);
  if (!c[pair.show]?.length) pair.show = ['won', 'lost', 'neither', 'both'].find((key) => c[key].length) ?? 'won';
  const words = {
    won: 'only the first succeeded',
    lost: 'only the second succeeded',
    both: 'both succeeded',
    neither: 'neither succeeded',
  };
  const tabs = el(
    'p',
    {},
    ...Object.entries(words).map(([key, w]) =>
      el(
        'button',
        {
          'aria-pressed': String(pair.show === key),
          onclick: () => {
            pair.show = key;
            again();
          },
        },
        `${w}: ${c[key].length}`,
      ),
    ),
  );
  const rows = c[pair.show]
    .slice(0, 300)
    .map((row) =>
      el(
        'button',
        { className: 'thumb', onclick: () => play([row.a, row.b]) },
        el('span', {}, row.task),
        el('span', {}, `seed ${row.seed}${row.initial_state ? ` · ${row.initial_state}` : ''}`),
      ),
    );
  place.replaceChildren(
    el('div', { className: 'filters' }, choose('a', 'first arm'), choose('b', 'second arm')),
    el(
      'p',
      {},
      `${c.counts.pairs} initial states that both played: ${c.counts.a} against ${c.counts.b}, `,
      `${c.counts.gain_points.toFixed(1)} points, p = ${c.counts.p.toPrecision(2)}`,
    ),
    tabs,
    el('h2', {}, `${words[pair.show]}`),
    rows.length ? el('div', { className: 'thumbs' }, ...rows) : el('p', {}, 'No initial state.'),
  );
}
