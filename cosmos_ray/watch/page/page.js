// Tabs, the address, and the stream of snapshots.
import { el } from '/draw.js';
import { asked, drawCompare, drawEpisodes, drawValue } from '/lists.js';
import { drawNow } from '/now.js';
import { play } from '/player.js';

const tabs = [...document.querySelectorAll('[role=tab]')];
const connection = document.getElementById('connection'),
  trouble = document.getElementById('trouble');
let state = null,
  current = 'now',
  drawn = '';

function open(name, focus = false) {
  current = name;
  for (const tab of tabs) {
    const here = tab.getAttribute('aria-controls') === name;
    tab.setAttribute('aria-selected', String(here));
    tab.tabIndex = here ? 0 : -1;
    document.getElementById(tab.getAttribute('aria-controls')).hidden = !here;
    if (here && focus) tab.focus();
  }
  if (!location.hash.startsWith(`#${name}`)) history.replaceState(null, '', `#${name}`);
  draw();
}

async function draw() {
  const place = document.getElementById(current);
  try {
    if (current === 'now') {
      if (state) drawNow(place, state);
    } else if (current === 'episodes') await drawEpisodes(place);
    else if (current === 'value')
      await drawValue(place, (filter) => {
        for (const key of Object.keys(asked)) delete asked[key];
        Object.assign(asked, filter);
        open('episodes');
      });
    else await drawCompare(place);
  } catch (error) {
    place.replaceChildren(el('p', { role: 'alert' }, error.message));
  }
}

for (const [i, tab] of tabs.entries()) {
  tab.addEventListener('click', () => open(tab.getAttribute('aria-controls')));
  tab.addEventListener('keydown', (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (by) open(tabs[(i + by + tabs.length) % tabs.length].getAttribute('aria-controls'), true);
  });
}

function take(next) {
  state = next;
  const name = state.name || state.store;
  document.getElementById('title').textContent = state.task ? `${name} · ${state.task}` : name;
  document.title = `${name} · cosmos_ray watch`;
  trouble.hidden = !state.trouble;
  trouble.textContent = state.trouble;
  const seen = `${state.episodes}/${state.unread}`;
  if (current === 'now') draw();
  else if (drawn !== seen && !document.getElementById('player').open && !document.activeElement?.closest?.('main select')) draw();
  drawn = seen;
}

const stream = new EventSource('/api/events');
stream.addEventListener('state', (event) => {
  connection.textContent = 'live';
  take(JSON.parse(event.data));
});
stream.addEventListener('error', () => {
  connection.textContent = 'not connected: the server may have ended; trying again';
});

const [view, ...rest] = location.hash.slice(1).split('/');
if (view === 'episode') {
  open('episodes');
  play(rest.map(decodeURIComponent));
} else if (document.getElementById(`tab-${view}`)) open(view);
