// The filter above the paper index: a row stays if it holds every word that was typed, and has a function if that is asked for.
(() => {
  const build = tables => {
    const rows = tables.flatMap(table => [...table.tBodies[0].rows].map(row => ({row, text: row.textContent.toLowerCase(), done: Boolean(row.cells[row.cells.length - 1].querySelector('code'))})));
    const host = document.createElement('form');
    host.className = 'orl-filter';
    host.innerHTML = '<label>Find <input type="search" autocomplete="off" placeholder="a method, a title, a number"></label>'
      + '<label><input type="checkbox"> only what has a notebook</label><output aria-live="polite"></output>';
    const [words, done] = host.querySelectorAll('input'), told = host.querySelector('output');
    const filter = () => {
      const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
      const kept = rows.filter(({row, text, done: has}) => {
        row.hidden = !(wanted.every(word => text.includes(word)) && (has || !done.checked));
        return !row.hidden;
      });
      tables.forEach(table => { table.closest('section').hidden = [...table.tBodies[0].rows].every(row => row.hidden); });
      told.value = kept.length === rows.length ? `${rows.length} shown` : `${kept.length} of ${rows.length} shown`;
    };
    host.addEventListener('input', filter);
    host.addEventListener('submit', event => event.preventDefault());
    tables[0].closest('section').before(host);
    filter();
  };

  document.addEventListener('DOMContentLoaded', () => {
    const tables = [...document.querySelectorAll('table.orl-papers')];
    if (tables.length) build(tables);
  });
})();
