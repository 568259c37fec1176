// Elements and charts. Text goes in as text nodes only: nothing that a store or a log says becomes markup.

export function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(properties)) {
    if (key.startsWith('on')) made.addEventListener(key.slice(2), value);
    else if (key in made && key !== 'list') made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined && child !== ''));
  return made;
}

export function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS('http://www.w3.org/2000/svg', tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith('on')) made.addEventListener(key.slice(2), value);
    else made.setAttribute(key, value);
  }
  made.append(...children.filter(Boolean));
  return made;
}

export const text = (x, y, words, anchor = 'start') => svg('text', { x, y, 'text-anchor': anchor }, document.createTextNode(words));
export const title = (words) => svg('title', {}, document.createTextNode(words));
export const percent = (share) => `${(100 * share).toFixed(0)} %`;
export const short = (value) =>
  Math.abs(value) >= 100 ? value.toFixed(0) : Math.abs(value) >= 1 ? value.toFixed(1) : value.toPrecision(2);

export function duration(seconds) {
  const s = Math.max(0, Math.round(seconds));
  if (s < 100) return `${s} s`;
  return s < 6000 ? `${Math.round(s / 60)} min` : s < 172800 ? `${(s / 3600).toFixed(1)} h` : `${Math.round(s / 86400)} days`;
}

export const clock = (time) => new Date(1000 * time).toLocaleString([], { dateStyle: 'short', timeStyle: 'medium' });

const W = 420,
  H = 170,
  LEFT = 38,
  RIGHT = 8,
  TOP = 8,
  BOTTOM = 22;

// Axes of a chart, `x` and `y` as [low, high]; returns the drawing and the two scales.
export function frame(name, x, y, xText, yText, height = H, width = W) {
  const spread = (range) => (range[1] > range[0] ? range[1] - range[0] : 1);
  const sx = (value) => LEFT + ((value - x[0]) / spread(x)) * (width - LEFT - RIGHT);
  const sy = (value) => height - BOTTOM - ((value - y[0]) / spread(y)) * (height - TOP - BOTTOM);
  const drawing = svg(
    'svg',
    { viewBox: `0 0 ${width} ${height}`, role: 'img', 'aria-label': name },
    svg('path', { class: 'axis', fill: 'none', d: `M${LEFT} ${TOP}V${height - BOTTOM}H${width - RIGHT}` }),
    text(LEFT - 4, sy(y[0]), yText(y[0]), 'end'),
    text(LEFT - 4, sy(y[1]) + 8, yText(y[1]), 'end'),
    text(LEFT, height - 7, xText(x[0])),
    text(width - RIGHT, height - 7, xText(x[1]), 'end'),
  );
  return { drawing, sx, sy, bottom: height - BOTTOM, top: TOP, left: LEFT, right: width - RIGHT, width };
}

export function line(points, colour, width = 1.6) {
  let path = '',
    pen = 'M';
  for (const [x, y] of points) {
    if (y === null || Number.isNaN(y)) pen = 'M';
    else {
      path += `${pen}${x.toFixed(1)} ${y.toFixed(1)}`;
      pen = 'L';
    }
  }
  return svg('path', { d: path, fill: 'none', stroke: `var(--${colour})`, 'stroke-width': width });
}

export function legend(entries) {
  const made = el('p', { className: 'legend muted' });
  for (const [colour, words] of entries) {
    const key = el('span', { className: 'key' });
    key.style.background = `var(--${colour})`;
    made.append(key, words);
  }
  return made;
}

export async function get(path, options) {
  const reply = await fetch(path, options);
  const body = await reply.json();
  if (!reply.ok) throw new Error(body.error || reply.statusText);
  return body;
}
