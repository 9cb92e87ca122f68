"""How the report's page looks."""

CSS = """
:root { --ink: #22272e; --soft: #667080; --line: #e3e6ea; --paper: #ffffff; --back: #f6f7f9;
  --green: #009e73; --greenish: #d6f0e6; --red: #b3261e; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
header, main, footer { max-width: 1060px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 36px; }
h1 { margin: 0; font-size: 28px; letter-spacing: -0.01em; }
.lead { margin: 4px 0 20px; color: var(--soft); font-size: 17px; }
nav { margin: 20px 0 8px; display: flex; flex-wrap: wrap; gap: 6px 18px; }
nav a { color: #0b62a8; text-decoration: none; }
nav a:hover { text-decoration: underline; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; }
.card { background: var(--paper); border: 1px solid var(--line); border-radius: 10px;
  padding: 12px 14px; }
.card .what { color: var(--soft); font-size: 13px; }
.card .value { font-size: 25px; font-weight: 600; line-height: 1.3; white-space: nowrap; }
.card .of { color: var(--soft); font-size: 12.5px; line-height: 1.35; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px;
  padding: 20px 26px 24px; margin: 18px 0; }
h2 { margin: 0 0 6px; font-size: 20px; }
p { margin: 6px 0 12px; max-width: 78ch; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin: 10px 0 14px; font-size: 14px; }
th { text-align: left; color: var(--soft); font-weight: 500; border-bottom: 1px solid var(--line);
  padding: 5px 12px 5px 0; white-space: nowrap; }
td { border-bottom: 1px solid #eef0f3; padding: 5px 12px 5px 0; vertical-align: top;
  overflow-wrap: break-word; }
th.n, td.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums;
  padding: 5px 0 5px 16px; }
figure { margin: 18px 0 8px; }
figure img { width: 100%; max-width: 980px; height: auto; display: block; }
figcaption { color: var(--soft); font-size: 13px; margin-top: 4px; }
code { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.examples { margin: 8px 0; padding-left: 20px; }
.examples li { margin: 4px 0; }
.examples q { display: block; quotes: none; color: var(--soft); overflow: hidden;
  font: 12.5px ui-monospace, Menlo, Consolas, monospace; max-height: 3.2em; }
details { margin: 10px 0; }
summary { cursor: pointer; color: #0b62a8; }
.legend span { margin-right: 10px; }
article { border-top: 1px solid var(--line); padding-top: 14px; margin-top: 18px; }
h3 { margin: 0 0 8px; font-size: 15px; font-weight: 600; }
h4 { margin: 12px 0 4px; font-size: 13px; font-weight: 400; color: var(--soft); }
h4 code { color: var(--ink); }
pre { margin: 0; padding: 12px 14px; background: #fbfbfc; border: 1px solid var(--line);
  border-radius: 8px; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.6 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.loss { background: var(--greenish); box-shadow: 0 0 0 1px var(--greenish); border-radius: 2px; }
.read { color: #7a828e; }
.gap { color: #7a828e; font-style: italic; font-size: 12.5px; }
pre .gap { display: block; text-align: center; margin: 6px 0; border-top: 1px dashed #ccd1d8;
  border-bottom: 1px dashed #ccd1d8; }
.bad { color: var(--red); font-weight: 600; }
.strip { display: flex; height: 14px; gap: 2px; margin: 6px 0 10px; }
.strip i { display: flex; border-radius: 2px; min-width: 1px; overflow: hidden; }
.strip b { background: #3bb68f; }
.strip .doc { background: #d3d9e0; }
.strip .pad { background: repeating-linear-gradient(45deg, #eceef1 0 4px, #f8f9fa 4px 8px); }
footer { color: var(--soft); font-size: 13px; padding: 6px 24px 40px; }
pre.plain { max-height: 40em; overflow-y: auto; }
@media print { body { background: #fff; } }
"""
