"""The style and the script of the dashboard's HTML pages."""

from __future__ import annotations

from pqueue_tools import dashboard

STYLE = """
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 14px/1.45 system-ui, sans-serif }
header, main, nav { max-width: 1280px; margin: 0 auto; padding: 0 16px }
header { display: flex; gap: 4px 16px; align-items: center; flex-wrap: wrap; padding-top: 12px; min-height: 46px }
#health .health { margin: 0 6px 0 0 }
header .path { color: var(--soft); font-size: 12.5px; overflow-wrap: anywhere }
#live { margin-left: auto; color: var(--soft); font-size: 12.5px; font-variant-numeric: tabular-nums }
nav { display: flex; gap: 4px; flex-wrap: wrap; margin-top: 6px }
nav a { padding: 5px 10px; border-radius: 6px; text-decoration: none }
nav a[aria-current] { background: var(--card); outline: 1px solid var(--line); color: var(--ink); font-weight: 600 }
h1 { font-size: 18px; margin: 0 } h1 a { color: inherit; text-decoration: none }
h2 { font-size: 14px; font-weight: 600; margin: 0 0 8px }
main:focus { outline: none } .stale main, .stale #health { opacity: 0.45 }
header:has(#away p) #health { display: none }
#away { flex: 1 0 100% } #away p, #trouble p { margin: 4px 0; overflow-wrap: anywhere }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 16px;
  margin: 10px 0; overflow-x: auto; position: relative }
section > :last-child { margin-bottom: 0 }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th { text-align: left; font-weight: 500; color: var(--soft); font-size: 12.5px }
th, td { padding: 5px 16px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top; white-space: nowrap }
th:last-child, td:last-child { padding-right: 0 }
tr:last-child td { border-bottom: 0 }
td.cut, th.cut { width: 99%; min-width: 140px; max-width: 0; overflow: hidden; text-overflow: ellipsis }
td.wrap { width: 99%; white-space: normal; overflow-wrap: anywhere }
td.name { max-width: 16vw; overflow: hidden; text-overflow: ellipsis }
td.name a { display: inline-block; max-width: 100%; overflow: hidden; text-overflow: ellipsis; vertical-align: top;
  outline-offset: -2px }
td.fold { white-space: normal; overflow-wrap: anywhere; min-width: 90px }
td.number, th.number { text-align: right } #queues th, #settings th { white-space: normal; vertical-align: bottom }
.soft { color: var(--soft) }
.only, .skip:not(:focus) { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%) }
.state { font-weight: 500 } .state::before { content: ""; display: inline-block; width: 8px; height: 8px;
  margin-right: 6px; border-radius: 50%; background: currentColor }
#said:empty { display: none }
#said { position: fixed; bottom: 12px; left: 50%; transform: translateX(-50%); max-width: 92vw; margin: 0; z-index: 2;
  padding: 9px 16px; border-radius: 8px; background: var(--ink); color: var(--page) }
#said.refused { background: var(--failed) }
dialog { border: 1px solid var(--line); border-radius: 10px; background: var(--card); color: var(--ink);
  padding: 16px 20px; max-width: 560px } dialog::backdrop { background: #0008 }
a { color: var(--processing) }
form { display: inline-flex; gap: 6px; flex-wrap: wrap; align-items: center; margin: 0 }
form.filter { display: flex; margin-bottom: 10px } form.block { display: block }
.chips { flex: 1 0 100%; display: flex; gap: 4px 14px; flex-wrap: wrap } .chip { white-space: nowrap }
input, select, button, textarea { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line);
  border-radius: 6px; padding: 3px 8px; max-width: 100%; min-height: 28px }
textarea { font: 12.5px/1.4 ui-monospace, monospace; flex: 1 0 100%; min-width: 0; color: var(--ink) }
::placeholder { color: var(--soft); opacity: 1 }
input[type=checkbox] { min-height: 0; width: 16px; height: 16px; margin: 2px 0; vertical-align: middle }
button { cursor: pointer } button:hover { border-color: var(--processing) }
:focus-visible { outline: 2px solid var(--processing); outline-offset: 1px }
details { display: inline-block; vertical-align: top; margin-right: 8px; max-width: 100% }
section > details:has(form) { margin-bottom: 8px } section > details[open]:has(textarea) { display: block }
details form { max-width: 100% }
summary { cursor: pointer; color: var(--processing) }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--page); border: 1px solid var(--line);
  border-radius: 6px; padding: 10px; margin: 4px 0; max-height: 420px; overflow-y: auto; font-size: 12.5px }
progress { width: 90px; height: 10px; accent-color: var(--processing) }
.ranges { margin: 0 0 6px; color: var(--soft); font-size: 12.5px } .range { padding: 3px 8px; border-radius: 6px }
.range[aria-current] { outline: 1px solid var(--line); color: var(--ink); font-weight: 600; text-decoration: none }
.bulk { display: flex; gap: 6px; flex-wrap: wrap; align-items: center; margin-bottom: 8px }
@media (max-width: 600px) { header, main, nav { padding: 0 10px } header { padding-top: 10px }
  nav a { padding: 8px 8px } #live { margin: 0; width: 100% }
  td.name { max-width: 28vw } section { padding: 10px } .less { display: none } table { font-size: 13px }
  th, td { padding-right: 8px } td.cut, th.cut { min-width: 76px }
  table:has(td.wrap) thead { position: absolute; clip-path: inset(50%) }
  tr:has(td.wrap) { display: flex; flex-wrap: wrap; border-bottom: 1px solid var(--line) }
  tr:has(td.wrap) td { border: 0; text-align: left }
  td:has(details[open]) { white-space: normal } details { margin: 0 } td form input { width: 76px }
  #queues td.name { width: 99%; max-width: 0; min-width: 60px }
  td .state::before { display: none }
  td.wrap { flex: 1 0 100%; order: -1; padding-right: 0 }
  tr:has(td.wrap) td.name { flex: 1 1 0; min-width: 60px; max-width: 50vw }
  #failed td.number:first-child a::after { content: "\\d7" }
  #activity td.number:not(:empty)::before { content: "jobs: " }
  tr:has(td.wrap) a[href*="/job/"]::before { content: "#" }
  form:not(:has(tbody :checked, [value=matching])) .bulk { display: none }
  td a, summary { display: inline-block; min-height: 24px; min-width: 24px } progress { width: 70px }
  input:not([type=checkbox]), select, button { min-height: 32px }
  input[type=checkbox] { width: 24px; height: 24px }
  form.filter input:not([type=checkbox]), form.filter select { flex: 1 1 45%; min-width: 0 } }
"""

# The page fetches itself, and takes over what has changed, row by row; a form is sent in the same way. Nothing changes
# while the reader selects, types, ticks or confirms. Without a script, the page is the same, but does not refresh.
SCRIPT = """'use strict';
const $ = id => document.getElementById(id);
const zone = Intl.DateTimeFormat().resolvedOptions().timeZone;
let tag = '', ahead = 0, answered = Date.now(), updated = answered, stopped = false;

function span(s) {
  if (s < 59.5) return (s >= 9.95 ? s.toFixed(0) : Math.max(0, s).toFixed(1)) + ' s';
  for (const [unit, size, most] of [['min', 60, 60], ['h', 3600, 24]]) {
    if (s / size < most - 0.5) return (s / size).toFixed(0) + ' ' + unit;
  }
  return (s / 86400).toFixed(0) + ' d';
}
const pad = n => String(n).padStart(2, '0');
function clock(at, dated) {
  const time = [at.getHours(), at.getMinutes(), at.getSeconds()].map(pad).join(':');
  if (!dated && at.toDateString() === new Date().toDateString()) return time;
  return [at.getFullYear(), pad(at.getMonth() + 1), pad(at.getDate())].join('-') + ' ' + time;
}
function say(element, text) { if (element.textContent !== text) element.textContent = text; }

function ages() {
  for (const each of document.querySelectorAll('time')) {
    const at = new Date(each.dateTime), age = (Date.now() + ahead - at) / 1000, kind = each.dataset.kind;
    if (isNaN(at)) continue;
    each.title = clock(at);
    say(each, kind === 'clock' ? clock(at) : kind === 'minute' ? clock(at).slice(-8, -3)
      : kind === 'day' ? clock(at, true).slice(5, -3) : kind === 'since' ? span(age)
      : kind === 'left' ? span(age * (1 / each.dataset.progress - 1))
      : kind === 'until' ? span(-age) : (kind === 'moment' ? clock(at) + ', ' : '')
      + (age < 0 ? 'in ' + span(-age) : span(age) + ' ago'));
  }
  for (const each of document.querySelectorAll('title[data-at]')) {
    say(each, clock(new Date(each.dataset.at * 1000)).slice(0, -3) + ': ' + each.dataset.text);
  }
  const age = (Date.now() - updated) / 1000, why = stopped ? 'paused' : held();
  const since = 'updated ' + span(age) + ' ago, times in ' + zone;
  say($('age'), $('trouble') ? '' : [why, since].filter(Boolean).join(', '));
  const isOld = $('away').firstChild || Date.now() - answered > STALE;
  document.body.classList.toggle('stale', isOld && !why && !$('trouble'));
}

function held() {
  const at = document.activeElement, selection = getSelection();
  if ($('ask').open || document.querySelector('main details[open] form')) return 'paused while you confirm';
  if (at && at.matches('input:not([type=checkbox]), select, textarea')) return 'paused while you type';
  if (document.querySelector('tbody input:checked')) return 'paused while jobs are ticked';
  return selection.isCollapsed || !$('main').contains(selection.anchorNode) ? '' : 'paused while you select';
}

const key = node => node.nodeType === 1 ? node.id || node.dataset.key || '' : '';
const same = (old, next) => old.nodeName === next.nodeName && key(old) === key(next);
function patch(old, next) {
  if (old.isEqualNode(next)) return;
  if (old.nodeType !== 1) { old.nodeValue = next.nodeValue; return; }
  for (const {name, value} of next.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  for (const {name} of [...old.attributes]) {
    if (!next.hasAttribute(name) && !['open', 'title', 'hidden'].includes(name)) old.removeAttribute(name);
  }
  if (old.nodeName === 'TIME' || old.nodeName === 'title') return;
  let at = old.firstChild;
  for (const child of [...next.childNodes]) {
    const match = key(child) ? [...old.childNodes].find(each => same(each, child)) : at && same(at, child) ? at : null;
    if (!match) { old.insertBefore(document.importNode(child, true), at); continue; }
    if (match !== at) old.insertBefore(match, at); else at = at.nextSibling;
    patch(match, child);
  }
  while (at) { const gone = at; at = at.nextSibling; gone.remove(); }
}

function show(text) {
  const next = new DOMParser().parseFromString(text, 'text/html');
  if (!!next.getElementById('trouble') !== !!$('trouble') && !next.getElementById('trouble')) return location.reload();
  document.title = next.title;
  for (const part of ['icon', 'health', 'path', 'main']) patch($(part), next.getElementById(part));
  prepare();
}

async function refresh() {
  if (document.hidden || stopped || held()) return;
  try {
    const answer = await fetch(location.href, {headers: {'If-None-Match': tag, Accept: 'text/html'}});
    ahead = answer.headers.get('X-Now') * 1000 - Date.now();
    if (answer.status === 503) {
      $('icon').href = $('icon').href.replace('icon.svg', 'icon-problem.svg');
      const next = new DOMParser().parseFromString(await answer.text(), 'text/html').getElementById('trouble');
      const shown = $('trouble') || $('away');
      if (next && shown.textContent !== next.textContent) shown.replaceChildren(...next.childNodes);
      return;
    }
    $('away').replaceChildren();
    if (answer.status !== 304) {
      const text = await answer.text();
      if (!held()) { tag = answer.headers.get('ETag') || ''; show(text); }
    }
    date(answer);
  } catch (error) { /* the age shows it */ }
}

function date(answer) {
  answered = Date.now();
  updated = answered - answer.headers.get('X-Age') * 1000;
}

async function send(form, button) {
  const body = new URLSearchParams(new FormData(form, button)), headers = {Accept: 'text/html'};
  const answer = await fetch(form.getAttribute('action'), {method: 'POST', body, headers});
  const text = await answer.text(), next = new DOMParser().parseFromString(text, 'text/html');
  const question = next.getElementById('question');
  $('ask').close();
  if (question) { $('ask').replaceChildren(...question.childNodes); return $('ask').showModal(); }
  const said = next.getElementById('said');
  if (said) { $('said').className = said.className; say($('said'), said.textContent); }
  if (!answer.ok) return;
  for (const each of document.querySelectorAll('main details[open]:has(form)')) each.open = false;
  for (const each of document.querySelectorAll('tbody input:checked')) each.checked = false;
  if (new URL(answer.url).pathname !== location.pathname) return location.assign(answer.url);
  tag = '';
  date(answer);
  show(text);
}

function prepare() {
  if ($('all')) $('all').hidden = false;
  count();
  ages();
}
function count() {
  const ticked = document.querySelectorAll('tbody input:checked').length;
  const option = document.querySelector('select[name=scope] option');
  if (option) say(option, ticked ? 'the ' + ticked + ' ticked' : 'the ticked jobs');
}

document.addEventListener('submit', event => {
  if (event.target.method !== 'post') return;
  event.preventDefault();
  const button = event.submitter, sent = send(event.target, button), shown = $('said').textContent;
  button.disabled = true;
  const slow = setTimeout(() => { $('said').className = 'done'; say($('said'), 'in progress …'); }, 500);
  sent.catch(() => say($('said'), 'the dashboard does not answer')).finally(() => {
    clearTimeout(slow);
    button.disabled = false;
    if ($('said').textContent === 'in progress …') say($('said'), shown);
  });
});
document.addEventListener('click', event => {
  if (event.target.id === 'pause') say(event.target, (stopped = !stopped) ? 'resume' : 'pause');
  if (event.target.matches('#ask .no')) { event.preventDefault(); $('ask').close(); }
  if (event.target.id !== 'all') return;
  for (const each of document.querySelectorAll('tbody input[name=id]')) each.checked = event.target.checked;
});
document.addEventListener('change', count);
$('pause').hidden = false;
prepare();
setInterval(ages, 1000);
setInterval(refresh, REFRESH);
refresh();
""".replace("REFRESH", str(dashboard.REFRESH_SECONDS * 1000)).replace("STALE", str(5000 * dashboard.REFRESH_SECONDS))
