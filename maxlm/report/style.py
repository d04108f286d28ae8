"""The style sheet of the report; its colors are CSS variables that `charts` defines."""

CSS = """
* { box-sizing: border-box; }
:root { --page: #f6f7f8; --good: #0f7a4f; --bad: #c02626; --tint: #2563eb1a; }
@media (prefers-color-scheme: dark) {
  :root { --page: #121417; --good: #4cd6a0; --bad: #ff8080; --tint: #74a3ff26; }
}
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; -webkit-text-size-adjust: 100%; }
main { max-width: 1060px; margin: 0 auto; padding: 28px 20px 48px; display: grid; gap: 16px;
  grid-template-columns: minmax(0, 1fr); }
header { display: flex; flex-wrap: wrap; gap: 6px 14px; align-items: center; }
h1 { margin: 0; font-size: 26px; line-height: 1.2; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { margin: 0 0 10px; font-size: 15px; font-weight: 600; }
small { font-size: 13px; font-weight: 400; color: var(--muted); }
.about, .quiet { margin: -8px 0 0; color: var(--muted); }
.quiet { margin: 0; }
.status { padding: 2px 10px; border-radius: 99px; font-size: 13px; border: 1px solid currentColor;
  color: var(--muted); }
.status.good { color: var(--good); }
.status.bad { color: var(--bad); }
.card, .tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.card { padding: 16px 18px; min-width: 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(168px, 1fr)); gap: 10px; }
.tile { padding: 12px 14px; }
.tile b { display: block; font-size: 21px; font-weight: 600; line-height: 1.25; letter-spacing: -.01em;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
.tile span { font-size: 13px; color: var(--muted); }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr)); gap: 16px; }
.grid:empty { display: none; }
figure { margin: 0; }
figure svg { display: block; width: 100%; height: auto; }
figure svg text { font-family: inherit; }
.narrow { display: none; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; margin: -4px 0 8px; font-size: 13px; color: var(--muted); }
.legend i, th i { display: inline-block; width: 16px; height: 3px; border-radius: 2px; margin-right: 7px;
  vertical-align: middle; }
.legend i.dot { width: 8px; height: 8px; border-radius: 50%; }
.legend i.dotted { height: 12px; width: 0; border-left: 2px dotted var(--muted); border-radius: 0; }
dl { display: grid; grid-template-columns: fit-content(40%) 1fr; gap: 8px 14px; margin: 0; align-items: center; }
dt { color: var(--muted); overflow-wrap: anywhere; }
dd { margin: 0; display: flex; align-items: center; gap: 10px; padding-right: 56px; }
dd i { height: 18px; border-radius: 0 4px 4px 0; background: var(--line); min-width: 2px; flex: none; }
dd b { font-weight: 500; font-variant-numeric: tabular-nums; margin-right: -56px; }
dt.own { color: var(--ink); font-weight: 600; }
dd.own i { background: var(--s0); }
.stack { display: flex; height: 18px; margin-bottom: 10px; border-radius: 4px; overflow: hidden; }
.stack i { flex: none; }
.time { max-width: 520px; }
.time td { width: 90px; }
blockquote, pre { margin: 0; font: 13px/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; }
mark { background: var(--tint); color: inherit; border-radius: 3px; padding: 1px 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
th { text-align: left; font-weight: 400; color: var(--muted); }
td { text-align: right; overflow-wrap: anywhere; }
th, td { padding: 5px 0; border-top: 1px solid var(--line); vertical-align: top; }
tr:first-child > * { border-top: 0; }
.pairs th { padding-right: 14px; min-width: 13ch; }
.pairs td { min-width: 8ch; }
.compare th, .compare td { padding: 7px 14px 7px 0; white-space: nowrap; }
.compare td, .compare thead th + th { text-align: right; padding: 7px 0 7px 14px; }
.compare tbody th { color: var(--ink); white-space: normal; min-width: 170px; overflow-wrap: anywhere; }
.compare thead th { white-space: normal; }
.compare tbody tr:first-child > * { border-top: 1px solid var(--line); }
.compare th small { display: block; padding-left: 23px; }
.best { font-weight: 650; }
.scroll { overflow-x: auto; }
details summary { cursor: pointer; font-weight: 600; }
details pre { margin-top: 12px; }
@media (max-width: 620px) {
  main { padding: 18px 12px 32px; gap: 12px; }
  .card { padding: 14px; }
  .tiles { grid-template-columns: repeat(auto-fit, minmax(128px, 1fr)); gap: 8px; }
  .tile { padding: 10px 12px; }
  .tile b { font-size: 18px; }
  .wide { display: none; }
  .narrow { display: block; }
  .pairs th { white-space: normal; }
  .grid figure { max-width: 420px; }
}
@media print { .card, .tile { break-inside: avoid; } }
"""
