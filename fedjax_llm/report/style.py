"""The style sheet of the page: a phone, a desk, paper; light and dark."""

CSS = """
:root {
  color-scheme: light dark;
  --ground: #ffffff; --raised: #f5f6f8; --ink: #1d1f23; --quiet: #565c66;
  --line: #d4d8de; --grid: #dfe2e7; --link: #1f5fae;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #14161a; --raised: #1d2025; --ink: #e6e8eb; --quiet: #a3a9b3;
    --line: #3a3f47; --grid: #30343b; --link: #82b4f0;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-padding-top: 1rem; }
body {
  margin: 0 auto; padding: 1.5rem clamp(0.9rem, 3vw, 2.5rem) 4rem;
  max-width: 84rem; background: var(--ground); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
h1, h2, h3 { line-height: 1.2; overflow-wrap: anywhere; text-wrap: balance; }
h1 { margin: 0; font-size: clamp(1.5rem, 4vw, 2.1rem); }
h2 {
  margin: 2.75rem 0 0.4rem; padding-top: 0.9rem; font-size: 1.3rem;
  border-top: 1px solid var(--line);
}
h3 { margin: 0; font-size: 1rem; }
p { margin: 0.4rem 0; max-width: 68ch; overflow-wrap: anywhere; }
a { color: var(--link); }
nav { display: flex; flex-wrap: wrap; gap: 0.2rem 1.1rem; margin-top: 0.7rem; }
nav a { padding: 0.25rem 0; text-underline-offset: 0.2em; }
.quiet { color: var(--quiet); font-size: 0.94rem; }
.notes { padding-left: 1.1rem; font-size: 0.94rem; max-width: 72ch; }
.notes li { overflow-wrap: anywhere; }
.figures {
  display: grid; gap: 1.6rem 2rem; align-items: start; margin: 1rem 0 1.2rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 23rem), 1fr));
}
figure { margin: 0; min-width: 0; max-width: 31rem; }
figcaption { margin-bottom: 0.3rem; font-weight: 600; font-size: 0.95rem; }
figure svg { display: block; width: 100%; height: auto; overflow: visible; }
.keys {
  display: flex; flex-wrap: wrap; gap: 0.15rem 1rem; margin: 0.4rem 0;
  padding: 0; list-style: none; font-size: 0.86rem;
}
.keys li { overflow-wrap: anywhere; }
.swatch {
  display: inline-block; width: 1.3em; height: 0; margin-right: 0.45em;
  border: 0 solid; border-top-width: 3px; vertical-align: 0.28em;
}
.scroll {
  margin: 1rem 0; max-width: 100%; max-height: 36rem; overflow: auto;
  overscroll-behavior-x: contain;
  border: 1px solid var(--line); border-radius: 6px;
}
.scroll:focus-visible, a:focus-visible, summary:focus-visible {
  outline: 2px solid var(--link); outline-offset: 2px;
}
table { border-collapse: collapse; width: 100%; font-size: 0.86rem; }
caption {
  padding: 0.5rem 0.7rem 0.3rem; text-align: left; color: var(--quiet);
}
th, td {
  padding: 0.32rem 0.5rem; text-align: left; vertical-align: top;
  white-space: nowrap; border-top: 1px solid var(--grid);
}
thead th {
  position: sticky; top: 0; z-index: 1; background: var(--raised);
  font-weight: 600; border-top: 0;
}
tbody th { font-weight: 500; }
.long {
  white-space: normal; overflow-wrap: anywhere; min-width: 14rem;
  max-width: 24rem;
}
.group th { padding-top: 0.8rem; max-width: none; font-weight: 600; }
.group span {
  display: inline-block; position: sticky; left: 0.7rem;
  max-width: min(60rem, 100vw - 4rem); white-space: normal;
  overflow-wrap: anywhere;
}
td.number, th.number {
  text-align: right; font-variant-numeric: tabular-nums;
}
summary { cursor: pointer; padding: 0.3rem 0; }
.sample {
  margin: 1rem 0; padding: 0.9rem 1rem; background: var(--raised);
  border-radius: 8px;
}
.sample blockquote {
  margin: 0.4rem 0 0.8rem; padding-left: 0.8rem; color: var(--quiet);
  border-left: 3px solid var(--line); white-space: pre-wrap;
  overflow-wrap: anywhere;
}
.sample dl {
  display: grid; gap: 0.8rem 1.4rem; margin: 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 16rem), 1fr));
}
dt { font-size: 0.82rem; color: var(--quiet); overflow-wrap: anywhere; }
dd { margin: 0.1rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere; }
@media print {
  :root {
    color-scheme: light;
    --ground: #fff; --raised: #fff; --ink: #000; --quiet: #444;
    --line: #bbb; --grid: #ddd; --link: #000;
  }
  @page { margin: 14mm; }
  body { padding: 0; max-width: none; font-size: 10pt; }
  nav { display: none; }
  h2 { margin-top: 1.6rem; }
  h2, .quiet, .keys, thead, .group { break-after: avoid; }
  .figures { grid-template-columns: 1fr 1fr; gap: 1rem 1.5rem; }
  figure, .sample, tr { break-inside: avoid; }
  .scroll { max-height: none; overflow: visible; border: 0; margin: 0.6rem 0; }
  table { font-size: 8pt; }
  th, td { padding: 0.15rem 0.4rem; white-space: normal; }
  thead th { position: static; }
  .sample { border: 1px solid var(--line); }
  details::details-content { content-visibility: visible; height: auto; }
  summary { list-style: none; }
}
"""
