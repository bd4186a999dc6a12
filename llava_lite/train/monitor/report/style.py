"""The style of the page: light and dark by the reader's setting, one column on a telephone, nothing fetched."""

CSS = """
:root {
  color-scheme: light dark;
  --page: #fff; --card: #f6f7f9; --ink: #1d2430; --muted: #5b6472; --rule: #dfe3e8; --faint: #b3bac4;
  --accent: #2a6fdb; --good: #1a7f4b; --warn: #9a5b00; --warn-card: #fff6e5; --bad: #b3261e;
  --c0: #2a6fdb; --c1: #d9660a; --c2: #16895a; --c3: #b0348f;
  --c4: #8a6d00; --c5: #0e8aa3; --c6: #c63d3d; --c7: #6b53c8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12161c; --card: #1b2028; --ink: #e4e8ee; --muted: #9aa4b2; --rule: #333b47; --faint: #5d6775;
    --accent: #7fb0ff; --good: #5fd39a; --warn: #f0b454; --warn-card: #2b2415; --bad: #ff8a80;
    --c0: #7fb0ff; --c1: #ffa057; --c2: #5fd39a; --c3: #ee8fd6;
    --c4: #dcc24a; --c5: #5cd0e6; --c6: #ff8a80; --c7: #b3a1ff;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink); overflow-wrap: anywhere;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 68rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { margin: 0; font-size: 1.7rem; line-height: 1.2; }
h2 { margin: 2.6rem 0 .8rem; padding-bottom: .3rem; border-bottom: 1px solid var(--rule); font-size: 1.25rem; }
h3 { margin: 1.4rem 0 .5rem; font-size: 1rem; }
p { margin: .5rem 0; max-width: 46rem; }
pre {
  margin: .8rem 0; padding: .8rem; border-radius: .5rem; background: var(--card); white-space: pre-wrap;
  font: .86em/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace;
}
summary { cursor: pointer; color: var(--accent); font-size: .92rem; }
details { margin: .6rem 0; }
.sub, .note { color: var(--muted); }
.note { font-size: .9rem; }
.fault { color: var(--warn); }
.badge {
  display: inline-block; margin-left: .6rem; padding: .1rem .6rem; border: 1px solid currentColor;
  border-radius: 1rem; color: var(--warn); font-size: .85rem; vertical-align: .25rem;
}
.badge.finished { color: var(--good); }
.badge.failed { color: var(--bad); }

.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .6rem; margin: 1rem 0; }
.figures div { padding: .6rem .8rem; border-radius: .5rem; background: var(--card); }
.figures dt { color: var(--muted); font-size: .8rem; }
.figures dd { margin: 0; font-size: 1.2rem; font-weight: 600; }
.figures small { display: block; color: var(--muted); font-size: .75rem; font-weight: 400; line-height: 1.3; }
.findings {
  margin: 1rem 0; padding: .6rem 1rem .6rem 2rem; border-left: 4px solid var(--warn); border-radius: .3rem;
  background: var(--warn-card);
}
.findings li { margin: .3rem 0; }

.terms { margin: 0; }
.terms div {
  display: grid; grid-template-columns: 12.5rem 1fr; gap: 0 1rem; padding: .25rem 0;
  border-bottom: 1px solid var(--rule);
}
.terms dt { color: var(--muted); }
.terms dd { margin: 0; min-width: 0; }
.charts .terms div { grid-template-columns: 10rem 1fr; }
.scroll { margin: .5rem 0; overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; overflow-wrap: normal; }
caption { padding-bottom: .3rem; color: var(--muted); text-align: left; }
th, td { padding: .3rem 1rem .3rem 0; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top; }
thead th { color: var(--muted); font-weight: 500; }
tbody th { font-weight: 500; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }

.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1.4rem 2rem; }
.chart { display: flex; flex-direction: column; justify-content: space-between; margin: 0; }
.chart svg { display: block; width: 100%; height: auto; }
.chart svg * { stroke-linejoin: round; stroke-linecap: butt; }
figcaption { margin-bottom: .3rem; font-size: .92rem; line-height: 1.35; }
figcaption span { color: var(--muted); }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1rem; margin: .15rem 0; color: var(--muted); font-size: .85rem; }
.legend span { display: inline-flex; align-items: center; gap: .35rem; }
.legend i { width: 1.3rem; border-top: 3px solid var(--k); }
.legend i.dashed { border-top: 2px dashed var(--k); }
.legend i.ramp {
  width: 8rem; height: .7rem; margin: 0 .2rem; border: 0;
  background: linear-gradient(90deg, #440154, #3b528b, #21918c, #5ec962, #fde725);
}

.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1rem; }
.sample { min-width: 0; padding: .8rem; border-radius: .5rem; background: var(--card); }
.sample h3 { margin: 0 0 .5rem; color: var(--muted); font-size: .85rem; font-weight: 500; }
.sample img { display: block; max-width: 100%; height: 10rem; margin-bottom: .5rem; border-radius: .3rem; }
.sample .text { margin: .2rem 0; font-size: .95rem; white-space: pre-wrap; }
.sample dl { margin: .5rem 0 0; }
.sample dl div { padding: .3rem 0; border-top: 1px solid var(--rule); }
.sample dt { color: var(--muted); font-size: .8rem; }
.sample dd { margin: 0; white-space: pre-wrap; }
.same { color: var(--good); }
footer { margin-top: 3rem; color: var(--muted); font-size: .85rem; }
@media (max-width: 40rem) {
  .terms div, .charts .terms div { grid-template-columns: 1fr; }
  table { font-size: .85rem; }
  th, td { padding-right: .7rem; }
}
"""
