// Draws what llava.picture.picture_data says: patches in the image's own pixels, with their scores and fates.
const VIEWS = { kept: 'Kept', attention: 'Attention', pairs: 'From a patch', groups: 'Merged groups', pick: 'Pick by hand' };
const HEAT = [[13, 8, 65], [106, 10, 131], [190, 55, 84], [243, 120, 25], [252, 230, 90]];
const BINS = 40;
const find = (selector) => element.querySelector(selector);
const svg = find('.vz-patches');
const state = { view: 'kept', tile: 0, layer: 0, cursor: null, picks: null, number: 0 };
let shown = null; // what the server sent
let data = null;

const escape = (text) => String(text).replace(/[&<>"']/g, (sign) => `&#${sign.charCodeAt(0)};`);
const tile = (at = state.tile) => data.tiles[at];
const place = (patch) => `row ${Math.floor(patch / tile().grid[1]) + 1}, column ${(patch % tile().grid[1]) + 1}`;

function heat(share) {
  const at = Math.min(Math.max(share, 0), 1) * (HEAT.length - 1);
  const low = Math.min(Math.floor(at), HEAT.length - 2);
  const mixed = HEAT[low].map((value, index) => Math.round(value + (HEAT[low + 1][index] - value) * (at - low)));
  return `rgb(${mixed})`;
}

// The golden angle: neighbouring groups get hues far apart.
const hue = (group) => `hsl(${(group * 137.508) % 360} 75% ${group % 2 ? 58 : 45}%)`;

function fate(patch) {
  const role = tile().role;
  if (!role) { return 'kept: the model is not zipped'; }
  if (state.picks) { return state.picks[state.tile].has(patch) ? 'picked by hand' : 'dropped by hand'; }
  if (role[patch] === 'merged') { return `merged into the token of ${place(tile().into[patch])}`; }
  if (role[patch] === 'target') {
    const group = tile().groups.find((each) => each.target === patch);
    return `contextual token: ${group.patches.length - 1} other patches are merged into it`;
  }
  return role[patch];
}

function startPicking() {
  state.picks = data.tiles.map((each) => new Set(each.rects.keys()));
  data.tiles.forEach((each, index) => {
    if (each.role) {
      state.picks[index] = new Set([...each.rects.keys()].filter((patch) => ['kept', 'target'].includes(each.role[patch])));
    }
  });
}

function isKept(patch, at = state.tile) {
  const role = tile(at).role;
  return state.picks ? state.picks[at].has(patch) : !role || role[patch] === 'kept';
}

// The patch whose attention is shown: the one under the pointer, at first the one in the middle.
const source = () => state.cursor ?? Math.floor(tile().grid[0] / 2) * tile().grid[1] + Math.floor(tile().grid[1] / 2);
const fromPatch = () => state.view === 'pairs' && tile().pairs;

// What is shown of each patch: attention in a layer; or that of one patch, as a share of the most it pays to any.
function values(at = state.tile) {
  const own = tile(at);
  if (!fromPatch()) { return own.attention[state.layer]; }
  own.unpacked ??= Uint8Array.from(atob(own.pairs), (sign) => sign.charCodeAt(0));
  const count = own.rects.length;
  return Array.from(own.unpacked.subarray(source() * count, (source() + 1) * count), (root) => (root / 255) ** 2);
}

function paint(patch, shares, top, groupOf, at) {
  const role = tile(at).role ? tile(at).role[patch] : 'kept';
  if (state.view === 'attention' || fromPatch()) {
    const edge = fromPatch() && tile(at).role && isKept(patch, at) ? ' class="dominant"' : '';
    return `fill="${heat(shares[patch] / top)}" fill-opacity="0.68"${edge}`;
  }
  if (state.view === 'groups' && !state.picks) {
    if (!groupOf.has(patch)) { return role === 'kept' ? 'fill="#fff" fill-opacity="0"' : 'fill="#101418" fill-opacity="0.82"'; }
    const edge = role === 'target' ? ' class="target"' : '';
    return `fill="${hue(groupOf.get(patch))}" fill-opacity="${edge ? 0.55 : 0.78}"${edge}`;
  }
  if (isKept(patch, at)) { return `fill="#fff" fill-opacity="0"${state.view === 'pick' ? ' class="picked"' : ''}`; }
  if (!state.picks && role === 'target') { return 'fill="#101418" fill-opacity="0.35" class="target"'; }
  return 'fill="#101418" fill-opacity="0.8"';
}

// The pixels of an image, tile or frame, and its patches on them.
function painted(at) {
  const { rects, groups } = tile(at);
  const shares = values(at);
  const top = Math.max(...shares);
  const groupOf = new Map();
  (groups ?? []).forEach((group, index) => group.patches.forEach((patch) => groupOf.set(patch, index)));
  const url = shown.urls[data.frames ? at : 0];
  return `<image href="${escape(url)}" width="${data.size[0]}" height="${data.size[1]}" preserveAspectRatio="none"/>` +
    rects.map(([left, upper, right, lower], patch) =>
      `<rect data-patch="${patch}" x="${left}" y="${upper}" width="${right - left}" height="${lower - upper}" ${paint(patch, shares, top, groupOf, at)}/>`).join('');
}

function drawPatches() {
  const { region } = tile();
  const [width, height] = data.size;
  const box = [Math.min(0, region[0]), Math.min(0, region[1]), Math.max(width, region[2]), Math.max(height, region[3])];
  svg.setAttribute('viewBox', [box[0], box[1], box[2] - box[0], box[3] - box[1]].join(' '));
  svg.innerHTML = painted(state.tile) + '<rect class="cursor" fill="none"/>';
  drawCursor();
}

function drawFrames() {
  const strip = find('.vz-frames');
  strip.hidden = find('.vz-caption').hidden = !data?.frames;
  strip.innerHTML = '';
  if (!data?.frames) { return; }
  strip.innerHTML = data.tiles.map(({ rects }, at) => {
    const kept = `${rects.filter((_, patch) => isKept(patch, at)).length} of ${rects.length} patches kept`;
    return `<button type="button" data-frame="${at}" aria-pressed="${at === state.tile}" aria-label="Frame ${at + 1}: ${kept}" title="Frame ${at + 1}: ${kept}">` +
      `<svg viewBox="0 0 ${data.size[0]} ${data.size[1]}">${painted(at)}</svg></button>`;
  }).join('');
  const all = data.tokens[1];
  find('.vz-caption').textContent = `Frame ${state.tile + 1} of ${data.frames}, below. ` +
    `Visual tokens: ${all / data.frames} per frame, ${all} in all.`;
}

function mark(cursor, patch) {
  const [left, upper, right, lower] = tile().rects[patch];
  Object.entries({ x: left, y: upper, width: right - left, height: lower - upper })
    .forEach(([name, value]) => cursor.setAttribute(name, value));
}

// The cursor is on another patch.
function moved() {
  if (fromPatch()) {
    const shares = values();
    const top = Math.max(...shares);
    svg.querySelectorAll('[data-patch]').forEach((rect, patch) => rect.setAttribute('fill', heat(shares[patch] / top)));
    drawHistogram();
  }
  drawCursor();
}

function drawCursor() {
  const cursor = svg.querySelector('.cursor');
  const info = find('.vz-info');
  if (state.cursor === null) {
    if (fromPatch()) { mark(cursor, source()); } else { cursor?.setAttribute('width', 0); }
    info.textContent = 'Point at a patch, or move with the arrow keys.';
    return;
  }
  mark(cursor, state.cursor);
  if (fromPatch()) {
    const shares = values();
    const most = shares.indexOf(Math.max(...shares));
    info.textContent = `${place(state.cursor)} · attends most to ${place(most)}, which is ${fate(most)}`;
    return;
  }
  const score = tile().attention[state.layer][state.cursor];
  const ranks = tile().attention[state.layer].filter((other) => other > score).length + 1;
  info.textContent = `${place(state.cursor)} · attention ${score.toPrecision(3)}, ` +
    `rank ${ranks} of ${tile().rects.length} · ${fate(state.cursor)}`;
}

function drawHistogram() {
  const scores = values();
  const top = Math.max(...scores);
  const bins = Array.from({ length: BINS }, () => [0, 0]);
  scores.forEach((score, patch) => {
    bins[Math.min(Math.floor((score / top) * BINS), BINS - 1)][isKept(patch) ? 1 : 0] += 1;
  });
  // Square roots: most patches are in the lowest bins, and the few high ones would not be seen.
  const scale = 68 / Math.sqrt(Math.max(...bins.map(([rest, kept]) => rest + kept)));
  find('.vz-histogram').innerHTML = bins.map(([rest, kept], index) => {
    const whole = Math.sqrt(rest + kept) * scale;
    const part = rest + kept ? whole * (kept / (rest + kept)) : 0; // never more than the whole
    const bar = (name, y, height) => `<rect class="${name}" x="${index * 8 + 0.5}" y="${y}" width="7" height="${height}"/>`;
    return bar('rest', 70 - whole, whole - part) + bar('kept', 70 - part, part);
  }).join('');
  const kept = scores.reduce((sum, score, patch) => sum + (isKept(patch) ? score : 0), 0);
  const number = scores.filter((_, patch) => isKept(patch)).length;
  const share = Math.round((100 * kept) / scores.reduce((sum, score) => sum + score, 0));
  const sentence = `${number} kept patches of ${scores.length} have ${share} % of ${fromPatch() ? "this patch's" : "this layer's"} attention`;
  find('.vz-share').textContent = `${sentence}. Bars: patches by attention, low to high; green: kept.`;
  find('.vz-histogram').setAttribute('aria-label', `Histogram: ${sentence}`);
}

function legend() {
  const swatch = (style, text) => `<span><i style="${style}"></i>${text}</span>`;
  const target = swatch('border-color:#111;outline:2px solid #fff;background:#777', 'contextual token, others are merged into it');
  return {
    kept: swatch('background:#fff', 'kept') + target + swatch('background:#30343a', 'merged or dropped'),
    attention: swatch(`background:linear-gradient(90deg,${HEAT.map((color) => `rgb(${color})`)});width:4em`, 'low to high attention'),
    pairs: swatch('border-color:#ffe14d', 'the patch that attends') + swatch('border-color:#fff;outline:1px solid #777', 'kept') +
      swatch(`background:linear-gradient(90deg,${HEAT.map((color) => `rgb(${color})`)});width:4em`, 'low to high, in the layer that decides'),
    groups: swatch('background:#fff', 'kept') + swatch(`background:linear-gradient(90deg,${[0, 1, 2, 3].map(hue)});width:4em`,
      'one colour for each contextual token') + target,
    pick: swatch('background:#fff;border-color:#0a7d4f', 'kept') + swatch('background:#30343a', 'dropped') + '<span>click to change, then Ask again</span>',
  }[state.view];
}

// Whether the model has what a view shows.
const fits = (view) => ({ groups: data?.method, pairs: data?.pairable, pick: data?.pickable })[view] ?? true;

function draw() {
  const views = Object.entries(VIEWS).filter(([name]) => fits(name));
  find('.vz-images').innerHTML = (shown?.images ?? []).map(({ name, url }, index) =>
    `<button type="button" data-image="${index}" aria-pressed="${index === shown.selected}" aria-label="Show ${escape(name)}" title="${escape(name)}">` +
    `<img src="${escape(url)}" alt=""></button>`).join('');
  find('.vz-images').hidden = (shown?.images.length ?? 0) < 2;
  ['.vz-bar', '.vz-patches', '.vz-info', '.vz-legend', '.vz-deep'].forEach((name) => find(name).toggleAttribute('hidden', !data));
  find('.vz-empty').hidden = Boolean(data);
  find('.vz-hand').hidden = !data || state.view !== 'pick';
  find('.vz-hint').textContent = shown?.hint ?? '';
  find('.vz-hint').hidden = !shown?.hint;
  drawFrames();
  if (!data) { return; }
  find('.vz-views').innerHTML = views.map(([name, label]) =>
    `<label><input type="radio" name="vz-view" value="${name}" ${name === state.view ? 'checked' : ''}><span>${label}</span></label>`).join('');
  find('.vz-tiles').hidden = data.frames || data.tiles.length < 2;
  find('.vz-tiles select').innerHTML = data.tiles.map((_, index) =>
    `<option value="${index}" ${index === state.tile ? 'selected' : ''}>${index ? index : 'whole image'}</option>`).join('');
  const slider = find('.vz-layer');
  slider.max = data.layers;
  slider.value = state.layer + 1;
  find('.vz-layer-name').textContent = `Encoder layer ${state.layer + 1} of ${data.layers}${state.layer === data.layer ? ', which decides' : ''}`;
  find('.vz-legend').innerHTML = legend();
  drawPatches();
  drawHistogram();
  count();
}

function count() {
  const picks = state.picks;
  find('.vz-count').textContent = picks ? `${picks[state.tile].size} of ${tile().rects.length} patches picked by hand` : 'as the method chose';
}

function send() {
  state.number += 1;
  const patches = state.picks && state.picks.map((each) => [...each].sort((one, other) => one - other));
  find('.vz-info').closest('.vz-picture').dataset.picks = state.number; // a question waits for them
  trigger('input', { image: shown.selected, drawn: shown.drawn, number: state.number, patches });
  drawPatches();
  drawHistogram();
  count();
}

function toggle(patch) {
  if (state.view !== 'pick') { return; }
  if (!state.picks) { startPicking(); }
  const picks = state.picks[state.tile];
  if (!picks.delete(patch)) { picks.add(patch); }
  send();
}

function receive() {
  const before = shown;
  shown = props.value ? JSON.parse(props.value) : null;
  data = shown?.data ?? null;
  if (data) {
    const other = !before?.data || String(before.urls) !== String(shown.urls);
    if (shown.view) { state.view = shown.view; }
    if (other) { state.cursor = null; state.tile = 0; }
    if (other || state.layer >= data.layers) { state.layer = shown.layer ?? data.layer; }
    state.tile = Math.min(state.tile, data.tiles.length - 1);
    if (!fits(state.view)) { state.view = 'attention'; }
    // Those picked since the server drew this, on the same picture, are on their way to it.
    const newer = !other && shown.drawn === before.drawn && shown.picked < state.number;
    if (!newer) { state.picks = shown.picks && shown.picks.map((each) => new Set(each)); }
  }
  draw();
}

element.addEventListener('click', (event) => {
  const image = event.target.closest('[data-image]');
  const frame = event.target.closest('[data-frame]');
  const action = event.target.closest('[data-do]');
  const patch = frame ? null : event.target.closest('[data-patch]');
  if (image) { trigger('select', { image: Number(image.dataset.image), pairs: state.view === 'pairs' }); }
  if (frame) {
    state.tile = Number(frame.dataset.frame);
    draw();
    find(`[data-frame="${state.tile}"]`).focus();
  }
  if (patch) { state.cursor = Number(patch.dataset.patch); toggle(state.cursor); moved(); }
  if (action) {
    const name = action.dataset.do;
    if (name === 'method') { state.picks = null; } else {
      if (!state.picks) { startPicking(); }
      state.picks[state.tile] = new Set(name === 'all' ? tile().rects.keys() : []);
    }
    send();
  }
});
element.addEventListener('change', (event) => {
  if (event.target.name === 'vz-view') {
    state.view = event.target.value;
    draw();
    find(`[value="${state.view}"]`).focus();
    if (state.view === 'pairs' && !tile().pairs) { trigger('select', { image: shown.selected, pairs: true }); }
  }
  if (event.target.matches('.vz-tiles select')) { state.tile = Number(event.target.value); state.cursor = null; draw(); }
});
element.addEventListener('input', (event) => {
  if (!event.target.matches('.vz-layer')) { return; }
  state.layer = Number(event.target.value) - 1;
  if (state.view !== 'attention') { state.view = 'attention'; }
  draw();
});
let pointer = '';
svg.addEventListener('pointermove', (event) => {
  const patch = event.target.closest('[data-patch]');
  const at = `${event.clientX} ${event.clientY}`;
  if (at === pointer) { return; } // a browser says so too when patches are drawn anew under a pointer at rest
  pointer = at;
  if (patch) { state.cursor = Number(patch.dataset.patch); moved(); }
});
svg.addEventListener('keydown', (event) => {
  const [rows, columns] = tile().grid;
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
  if (step) {
    event.preventDefault();
    const next = (state.cursor ?? 0) + (state.cursor === null ? 0 : step);
    const wraps = Math.abs(step) === 1 && Math.floor(next / columns) !== Math.floor((state.cursor ?? next) / columns);
    if (next >= 0 && next < rows * columns && !wraps) { state.cursor = next; moved(); }
  } else if ((event.key === ' ' || event.key === 'Enter') && state.cursor !== null) {
    event.preventDefault();
    toggle(state.cursor);
  }
});
watch('value', receive);
receive();
