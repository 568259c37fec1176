// The panel of what happens now.
import { clock, duration, el, frame, legend, line, percent, short, svg, text, title } from '/draw.js';

export function drawNow(place, state) {
  const parts = [stageCard(state), facts(state)];
  if (state.command) parts.push(working(state.command));
  if (state.versions.length)
    parts.push(card('Success by policy version', versions(state), legend([['blue', 'rollouts, with 95 % interval']])));
  if (state.over_time)
    parts.push(
      card(
        'Episodes over time',
        overTime(state),
        legend([
          ['green', 'succeeded'],
          ['red', 'failed'],
          ['orange', 'death or wait'],
        ]),
      ),
    );
  for (const [stage, points] of Object.entries(state.curves)) parts.push(card(`Loss: ${stage}`, curve(stage, points, state.marks)));
  if (state.staleness.length)
    parts.push(card('Staleness: versions between an episode’s begin and the newest weights', stale(state.staleness)));
  if (state.evaluation.length) parts.push(card('Evaluation', armTable(state.evaluation)));
  if (state.marks.length) parts.push(events(state));
  if (!state.episodes)
    parts.push(card('No episode yet', el('p', {}, 'The store is empty. Episodes show up here as they are committed.')));
  const scrolled = place.querySelector('.scroll')?.scrollTop ?? 0;
  place.replaceChildren(el('div', { className: 'grid' }, ...parts));
  const box = place.querySelector('.scroll');
  if (box) box.scrollTop = scrolled;
}

function card(name, ...children) {
  return el('div', { className: 'card' }, el('h2', {}, name), ...children);
}

function stageCard(state) {
  const s = state.stage,
    made = el('div', { className: 'card wide' });
  if (!s) {
    made.append(el('p', { className: 'stage' }, state.name ? 'Nothing has happened in this run yet.' : 'A store without a run.'));
    return made;
  }
  const process = state.process,
    quiet = state.time - s.since;
  let doing = s.ended ? `${s.name} is done` : s.name;
  if (state.name && process && process.alive === false) doing += ' — no command works on the run';
  else if (quiet > 120) doing += ` — nothing new for ${duration(quiet)}`;
  const count = s.total ? `${s.done} of ${s.total}` : `${s.done}`;
  const left = s.left === null ? '' : `, about ${duration(s.left)} left`;
  made.append(el('p', { className: 'stage' }, el('strong', {}, doing), ` ${s.ended ? '' : count + left}`));
  if (s.total && !s.ended)
    made.append(el('progress', { max: s.total, value: Math.min(s.done, s.total), 'aria-label': `progress of ${s.name}` }));
  made.append(
    el(
      'p',
      { className: 'muted' },
      `last event ${clock(s.since)}`,
      state.stages.length ? `; done: ${state.stages.map((d) => `${d.name} (${duration(d.seconds || 0)})`).join(', ')}` : '',
    ),
  );
  return made;
}

// The processes of the command that works on the run, as it tells of them every two seconds.
function working(command) {
  const lines = (rows, name) => el('ul', { className: 'plain', 'aria-label': name }, ...rows.map((row) => el('li', {}, row)));
  const made = el('div', { className: 'card wide' }, el('h2', {}, 'At work'), lines(command.processes, 'processes'));
  if (command.waiting.length) made.append(el('h2', {}, 'Waits'), lines(command.waiting, 'waits'));
  made.append(el('p', { className: 'muted' }, `${command.words}; said ${Math.round(command.age)} s ago`));
  return made;
}

function facts(state) {
  const made = el('dl', { className: 'facts' });
  const add = (name, value) => made.append(el('div', {}, el('dt', {}, name), el('dd', {}, value)));
  add('episodes', String(state.episodes));
  for (const [name, count] of Object.entries(state.counts)) if (count) add(name, String(count));
  add('episodes/min', short(state.rates.episodes_per_min));
  add('env steps/s', short(state.rates.env_steps_per_s));
  if (state.rates.learner_steps_per_s !== undefined) add('learner steps/s', short(state.rates.learner_steps_per_s));
  if (state.version !== null && state.version !== undefined) add('weight version', String(state.version));
  const newest = state.versions.at(-1);
  if (newest) add('newest version that acted', String(newest.version));
  if (state.staleness.length) add('staleness, last 20', short(mean(state.staleness.slice(-20).map((s) => s.versions))));
  const deaths = state.marks.filter((mark) => mark.kind === 'death').length;
  if (deaths) add('deaths', String(deaths));
  if (state.quarantined) add('quarantined files', String(state.quarantined));
  if (state.unread) add('headers still to read', String(state.unread));
  return el('div', { className: 'card wide' }, made);
}

const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;

function versions(state) {
  const rows = state.versions,
    last = Math.max(1, rows.length - 1);
  const f = frame('Success by policy version', [0, last], [0, 1], (i) => (i < rows.length ? `v${rows[i].version}` : ''), percent);
  for (const [i, row] of rows.entries()) {
    const x = f.sx(rows.length === 1 ? 0.5 : i);
    const words = `version ${row.version}: ${row.successes} of ${row.episodes} (${percent(row.low)} to ${percent(row.high)})`;
    f.drawing.append(
      svg(
        'g',
        {},
        title(words),
        svg('path', { d: `M${x} ${f.sy(row.low)}V${f.sy(row.high)}`, stroke: 'var(--blue)', 'stroke-width': 2 }),
        svg('circle', { cx: x, cy: f.sy(row.successes / row.episodes), r: 4, fill: 'var(--blue)' }),
      ),
    );
  }
  return f.drawing;
}

function overTime(state) {
  const o = state.over_time,
    most = Math.max(1, ...o.episodes),
    width = (o.end - o.begin) / o.episodes.length;
  const f = frame('Episodes over time', [o.begin, o.end], [0, most], (t) => clock(t), String);
  for (const [i, count] of o.episodes.entries()) {
    const x = f.sx(o.begin + i * width),
      w = Math.max(1, f.sx(o.begin + (i + 1) * width) - x - 0.6);
    const bar = (low, high, colour) =>
      svg('rect', { x, y: f.sy(high), width: w, height: f.sy(low) - f.sy(high), fill: `var(--${colour})` });
    if (count)
      f.drawing.append(
        svg(
          'g',
          {},
          title(`${o.successes[i]} of ${count} succeeded`),
          bar(0, o.successes[i], 'green'),
          bar(o.successes[i], count, 'red'),
        ),
      );
  }
  f.drawing.append(...marks(state.marks, f, o.begin, o.end));
  return f.drawing;
}

function marks(all, f, begin, end) {
  return all
    .filter((m) => m.kind !== 'resume' && m.time >= begin && m.time <= end)
    .map((m) =>
      svg(
        'g',
        {},
        title(`${clock(m.time)}: ${m.text}`),
        svg('path', {
          d: `M${f.sx(m.time)} ${f.top}V${f.bottom}`,
          stroke: 'var(--orange)',
          'stroke-width': 2,
          'stroke-dasharray': m.kind === 'wait' ? '3 3' : '',
        }),
      ),
    );
}

function curve(stage, points, all) {
  const begin = points[0].time,
    end = Math.max(points.at(-1).time, begin + 1);
  const losses = points.map((p) => p.loss).filter((v) => v !== null && v !== undefined);
  const high = losses.length ? Math.max(...losses) : 1;
  const f = frame(
    `Loss of ${stage}`,
    [begin, end],
    [0, high],
    (t) => (t === begin ? `step ${points[0].step}` : `step ${points.at(-1).step}`),
    (v) => v.toPrecision(2),
  );
  f.drawing.append(
    line(
      points.map((p) => [f.sx(p.time), p.loss === null || p.loss === undefined ? null : f.sy(p.loss)]),
      'blue',
    ),
    ...marks(all, f, begin, end),
  );
  if (losses.length) f.drawing.append(text(410, f.top + 8, `now ${losses.at(-1).toPrecision(3)}`, 'end'));
  return f.drawing;
}

function stale(rows) {
  const f = frame(
    'Staleness',
    [0, Math.max(1, rows.length - 1)],
    [0, Math.max(1, ...rows.map((r) => r.versions))],
    (i) => (i ? 'newest episode' : 'oldest'),
    String,
  );
  f.drawing.append(
    line(
      rows.map((r, i) => [f.sx(i), f.sy(r.versions)]),
      'orange',
    ),
  );
  return f.drawing;
}

function armTable(arms) {
  return el(
    'table',
    {},
    el('thead', {}, el('tr', {}, ...['arm', 'successes', '95 % interval'].map((w) => el('th', { scope: 'col' }, w)))),
    el(
      'tbody',
      {},
      ...arms.map((a) =>
        el(
          'tr',
          {},
          el('td', {}, a.arm),
          el('td', {}, `${a.successes} of ${a.episodes}`),
          el('td', {}, `${percent(a.low ?? 0)} to ${percent(a.high ?? 1)}`),
        ),
      ),
    ),
  );
}

function events(state) {
  const rows = state.marks
    .slice()
    .reverse()
    .slice(0, 100)
    .map((m) => el('tr', {}, el('td', {}, clock(m.time)), el('td', {}, m.text)));
  return el(
    'div',
    { className: 'card wide' },
    el('h2', {}, 'Deaths, waits and restarts'),
    el('div', { className: 'scroll', tabIndex: 0 }, el('table', {}, el('tbody', {}, ...rows))),
  );
}
