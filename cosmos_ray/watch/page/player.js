// One episode, or two side by side, as video with the value curve and the candidates' scores.
import { clock, el, frame, get, line, percent, svg, title } from '/draw.js';

const dialog = document.getElementById('player');
let stop = () => {};

export async function play(names) {
  stop();
  dialog.replaceChildren(el('p', {}, 'loading'));
  if (!dialog.open) dialog.showModal();
  try {
    show(await Promise.all(names.map((name) => get(`/api/episodes/${encodeURIComponent(name)}`))), names);
  } catch (error) {
    dialog.replaceChildren(top('Episode'), el('p', { role: 'alert' }, error.message));
  }
}

dialog.addEventListener('close', () => {
  stop();
  if (location.hash.startsWith('#episode/')) history.replaceState(null, '', '#episodes');
});

function top(words) {
  return el('div', { className: 'top' }, el('h2', {}, words), el('button', { onclick: () => dialog.close() }, 'Close'));
}

function show(episodes, names) {
  const longest = Math.max(...episodes.map((e) => e.length));
  const sides = episodes.map((episode) =>
    makeSide(
      episode,
      (step) => set(step),
      () => play(names),
      episodes.length === 1 && dialog.clientWidth > 700,
    ),
  );
  const range = el('input', {
    type: 'range',
    min: 0,
    max: longest,
    value: 0,
    'aria-label': 'control step',
    oninput: () => set(Number(range.value)),
  });
  const told = el('output', {}),
    button = el('button', { onclick: () => (timer ? pause() : begin()) }, 'Play');
  const speed = el(
    'select',
    { 'aria-label': 'speed' },
    ...[0.25, 0.5, 1, 2, 4].map((s) => el('option', { value: s, selected: s === 1 }, `${s}×`)),
  );
  let timer = 0;
  function set(step) {
    range.value = step;
    told.textContent = `step ${step} / ${longest}`;
    for (const side of sides) side.at(step);
  }
  function pause() {
    clearInterval(timer);
    timer = 0;
    button.textContent = 'Play';
  }
  function begin() {
    if (Number(range.value) >= longest) set(0);
    let from = Number(range.value),
      since = performance.now();
    button.textContent = 'Pause';
    timer = setInterval(() => {
      const step = Math.floor(from + ((performance.now() - since) / 1000) * episodes[0].rate * Number(speed.value));
      set(Math.min(step, longest));
      if (step >= longest) pause();
    }, 40);
  }
  const keys = (event) => {
    if (['BUTTON', 'SELECT', 'SUMMARY'].includes(event.target.tagName)) return;
    if (event.key === ' ') {
      event.preventDefault();
      if (timer) pause();
      else begin();
    } else if (event.target !== range && (event.key === 'ArrowRight' || event.key === 'ArrowLeft')) {
      set(Math.min(longest, Math.max(0, Number(range.value) + (event.key === 'ArrowRight' ? 1 : -1))));
    }
  };
  dialog.addEventListener('keydown', keys);
  stop = () => {
    pause();
    dialog.removeEventListener('keydown', keys);
    for (const side of sides) side.close();
    stop = () => {};
  };
  const head = episodes.length === 1 ? episodes[0].name : `${episodes[0].task}, seed ${episodes[0].seed}: side by side`;
  dialog.replaceChildren(
    top(head),
    el('div', { className: 'sides' }, ...sides.map((side) => side.pictures)),
    el('div', { className: 'scrub' }, button, speed, range, told),
    el('div', { className: 'sides' }, ...sides.map((side) => side.below)),
  );
  set(0);
  range.focus();
}

function makeSide(episode, seek, again, wide) {
  const base = `/api/episodes/${encodeURIComponent(episode.name)}`;
  let steps = episode.rendered.state === 'done' ? [...Array(episode.length + 1).keys()] : episode.frames;
  const images = episode.cameras.map((camera) => el('img', { alt: `${camera} of ${episode.name}` }));
  const caption = el('p', { className: 'muted' });
  let shown = -1,
    polling = 0;
  const preloaded = steps.slice(0, 1200).flatMap((step) =>
    episode.cameras.map((_, c) => {
      const i = new Image();
      i.src = `${base}/frames/${c}/${step}`;
      return i;
    }),
  );
  const curve = valueCurve(episode, seek, wide),
    fan = el('div', {});
  function at(step) {
    const here = Math.min(step, episode.length);
    const known = steps.filter((s) => s <= here).at(-1) ?? steps[0];
    if (known !== undefined && known !== shown) {
      shown = known;
      images.forEach((image, c) => {
        image.src = `${base}/frames/${c}/${known}`;
      });
    }
    caption.textContent =
      known === undefined
        ? 'no picture is stored'
        : known === here
          ? `picture of step ${known}`
          : `picture of step ${known}, the last one before step ${here}`;
    curve.at(here);
    fan.replaceChildren(...candidates(episode, here));
  }
  const waiting = el('p', { role: 'status' });
  const button = steps.length <= episode.length ? el('button', { onclick: render }, 'Render every step from the simulator states') : null;
  async function render() {
    button.disabled = true;
    try {
      await get(`${base}/render`, { method: 'POST', headers: { 'X-Watch': '1' } });
      polling = setInterval(async () => {
        const state = (await get(base)).rendered;
        waiting.textContent = state.state === 'failed' ? state.error : `${state.frames} of ${episode.length + 1} steps rendered`;
        if (state.state === 'running') return;
        clearInterval(polling);
        if (state.state === 'done') again();
        else button.disabled = false;
      }, 1000);
    } catch (error) {
      waiting.textContent = error.message;
      button.disabled = false;
    }
  }
  const pictures = el(
    'div',
    {},
    el(
      'p',
      {},
      el('strong', { className: episode.outcome }, outcome(episode)),
      ` · ${episode.arm || episode.source} · policy version ${episode.version}`,
    ),
    el('p', {}, `“${episode.instructions.map((pair) => pair[1]).join(' / ')}”`),
    el('div', { className: 'views' }, ...images.map((image, c) => el('figure', {}, image, el('figcaption', {}, episode.cameras[c])))),
    caption,
    button,
    waiting,
  );
  const below = el('div', {}, curve.drawing, fan, facts(episode));
  return {
    pictures,
    below,
    at,
    close: () => {
      clearInterval(polling);
      preloaded.length = 0;
    },
  };
}

function outcome(e) {
  if (e.outcome === 'invalid') return `simulation broke after ${e.length} steps: ${e.invalid}`;
  return e.outcome === 'success' ? `success after ${e.length} steps` : `${e.timed_out ? 'timed out' : 'failed'} after ${e.length} steps`;
}

function valueCurve(episode, seek, wide) {
  const f = frame(
    'Predicted value of each decision',
    [0, episode.length],
    [0, 1],
    (s) => `step ${s}`,
    percent,
    130,
    wide ? 1000 : undefined,
  );
  const ds = episode.decisions;
  for (const d of ds)
    for (const [i, score] of d.scores.entries()) {
      if (score !== null && d.scores.length > 1)
        f.drawing.append(
          svg('circle', {
            cx: f.sx(d.step),
            cy: f.sy(Math.min(1, Math.max(0, score))),
            r: 2,
            fill: i === d.chosen ? 'var(--green)' : 'var(--muted)',
          }),
        );
    }
  f.drawing.append(
    line(
      ds.map((d) => [f.sx(d.step), f.sy(d.value)]),
      'red',
    ),
  );
  for (const d of ds)
    f.drawing.append(
      svg(
        'circle',
        { cx: f.sx(d.step), cy: f.sy(d.value), r: 3, fill: 'var(--red)' },
        title(`step ${d.step}: value ${percent(d.value)}`),
      ),
    );
  episode.rewards.forEach((r, s) => {
    if (r)
      f.drawing.append(
        svg('path', { d: `M${f.sx(s + 1)} ${f.bottom}v-8`, stroke: 'var(--green)', 'stroke-width': 2 }, title(`reward ${r}`)),
      );
  });
  const cursor = svg('path', { stroke: 'var(--blue)', 'stroke-width': 1.5 });
  f.drawing.append(cursor);
  f.drawing.addEventListener('click', (event) => {
    const box = f.drawing.getBoundingClientRect(),
      x = ((event.clientX - box.left) / box.width) * f.width;
    seek(Math.max(0, Math.min(episode.length, Math.round(((x - f.left) / (f.right - f.left)) * episode.length))));
  });
  const drawing = el(
    'div',
    {},
    el(
      'p',
      { className: 'muted' },
      ds.length ? 'value predicted at each decision (red), scores of candidates (grey; green: chosen)' : 'no value was predicted',
    ),
    f.drawing,
  );
  return { drawing, at: (step) => cursor.setAttribute('d', `M${f.sx(step)} ${f.top}V${f.bottom}`) };
}

function candidates(episode, step) {
  const decision = episode.decisions.filter((d) => d.step <= step).at(-1);
  if (!decision || decision.scores.length < 2) return [];
  const rows = decision.scores
    .map((score, i) => [score, i])
    .sort((a, b) => (b[0] ?? -1) - (a[0] ?? -1))
    .map(([score, i]) =>
      el(
        'tr',
        {},
        el('td', {}, `${i}${i === decision.chosen ? ' (chosen)' : ''}`),
        el('td', {}, score === null ? '?' : score.toFixed(4)),
        el('td', {}, el('progress', { max: 1, value: Math.min(1, Math.max(0, score ?? 0)), 'aria-label': `score of candidate ${i}` })),
      ),
    );
  return [
    el(
      'details',
      { open: true },
      el('summary', {}, `${decision.scores.length} candidates at step ${decision.step}, best first`),
      el('table', {}, el('tbody', {}, ...rows)),
    ),
  ];
}

function facts(e) {
  const rows = [
    ['task', e.task],
    ['seed', e.seed],
    ['initial state', e.initial_state],
    ['attempt', e.attempt],
    ['run key', e.run],
    ['return', e.return],
    ['committed', e.created ? clock(e.created) : ''],
    ...Object.entries(e.info),
  ].filter(([, value]) => value !== '' && value !== null);
  return el(
    'details',
    {},
    el('summary', {}, 'seeds, settings, and the command that replays it bit for bit'),
    el('p', {}, el('code', {}, e.replay)),
    el(
      'table',
      {},
      el('tbody', {}, ...rows.map(([k, v]) => el('tr', {}, el('th', { scope: 'row' }, k.replaceAll('_', ' ')), el('td', {}, String(v))))),
    ),
  );
}
