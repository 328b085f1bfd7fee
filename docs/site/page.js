// Sorts tables, plays videos while they are seen, and loads a page again that
// report.py --watch keeps up to date. Without it a page only misses these.
'use strict';

function compare(a, b) {
  const numbers = Number(a) - Number(b);
  return Number.isNaN(numbers) ? a.localeCompare(b) : numbers;
}

function sort(table, index) {
  const headers = [...table.tHead.rows[0].cells];
  const down = headers[index].ariaSort === 'ascending';
  headers.forEach((header) => header.removeAttribute('aria-sort'));
  headers[index].setAttribute('aria-sort', down ? 'descending' : 'ascending');
  const value = (row) => row.cells[index].dataset.value;
  const rows = [...table.tBodies[0].rows];
  const full = rows.filter((row) => value(row) !== '');
  full.sort((a, b) => (down ? -1 : 1) * compare(value(a), value(b)));
  const empty = rows.filter((row) => value(row) === '');
  table.tBodies[0].append(...full, ...empty);
}

function makeSortable(table) {
  [...table.tHead.rows[0].cells].forEach((header, index) => {
    const button = document.createElement('button');
    button.append(...header.childNodes);
    button.addEventListener('click', () => sort(table, index));
    header.append(button);
  });
}

const observer = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (isIntersecting) target.play().catch(() => {});  // if not allowed
    else target.pause();
  }
}, { threshold: 0.5 });

function playWhileSeen(video) {
  const show = (shown) => () => { video.controls = shown; };
  video.controls = false;
  video.tabIndex = 0;
  for (const name of ['pointerenter', 'focus']) {
    video.addEventListener(name, show(true));
  }
  for (const name of ['pointerleave', 'blur']) {
    video.addEventListener(name, show(false));
  }
  observer.observe(video);
}

document.querySelectorAll('table.sortable').forEach(makeSortable);
if (!matchMedia('(prefers-reduced-motion: reduce)').matches) {
  document.querySelectorAll('video').forEach(playWhileSeen);
}
const seconds = Number(document.body.dataset.refresh);
if (seconds) setTimeout(() => location.reload(), 1000 * seconds);
