"""The style of a report: one sheet, light and dark by the reader's action, from a phone's width up, and for print."""

LIGHT = {
    "ground": "#ffffff",
    "raised": "#f6f8fa",
    "ink": "#1f2328",
    "muted": "#59636e",
    "rule": "#d1d9e0",
    "link": "#0b5cad",
    "note": "#9a6700",
    "note-ground": "#fff8c5",
    "series-1": "#0072b2",
    "series-2": "#d55e00",
    "series-3": "#00805d",
    "series-4": "#b0578d",
    "series-5": "#8f6c00",
    "series-6": "#2b87c0",
}
DARK = {
    "ground": "#0f1419",
    "raised": "#182028",
    "ink": "#e6edf3",
    "muted": "#9aa7b4",
    "rule": "#333d47",
    "link": "#6cb6ff",
    "note": "#e3b341",
    "note-ground": "#2b2410",
    "series-1": "#56b4e9",
    "series-2": "#f28e4b",
    "series-3": "#2fc79c",
    "series-4": "#e29ac4",
    "series-5": "#e0b83f",
    "series-6": "#9bd1f2",
}
"""The same names as `LIGHT`; lighter shades of the same hues, so that a line keeps its contrast on the dark ground."""


def _variables(theme: dict[str, str]) -> str:
    return "".join(f"--{name}:{value};" for name, value in theme.items())


SHEET = f"""
:root{{color-scheme:light dark;{_variables(LIGHT)}}}
@media (prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}
*{{box-sizing:border-box}}
html{{-webkit-text-size-adjust:100%;scroll-behavior:smooth}}
body{{margin:0;background:var(--ground);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
  "Helvetica Neue",Arial,sans-serif}}
main{{max-width:1080px;margin:0 auto;padding:28px 24px 64px}}
h1{{font-size:1.75rem;line-height:1.2;margin:0 0 4px;letter-spacing:-.01em;overflow-wrap:anywhere}}
h2{{font-size:1.25rem;margin:48px 0 12px;padding-top:12px;border-top:1px solid var(--rule)}}
h3{{font-size:1rem;margin:24px 0 8px}}
p{{max-width:72ch;margin:8px 0}}
a{{color:var(--link)}}
.sub{{color:var(--muted);margin:0 0 16px}}
nav{{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:.9rem;margin:20px 0 0}}
nav a{{text-decoration:none;padding:4px 0}}
nav a:hover{{text-decoration:underline}}
.tiles{{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:20px 0 0}}
.tile{{background:var(--raised);border:1px solid var(--rule);border-radius:10px;padding:12px 14px}}
.tile b{{display:block;font-size:1.45rem;line-height:1.25;font-variant-numeric:tabular-nums;font-weight:650}}
.tile span{{display:block;color:var(--muted);font-size:.85rem}}
.note{{background:var(--note-ground);border:1px solid var(--note);border-radius:10px;padding:10px 16px;margin:20px 0 0}}
.note ul{{margin:4px 0;padding-left:20px}}
.pair{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:24px;align-items:start}}
.pair>*{{min-width:0}}
figure{{margin:12px 0}}
figure svg,figure img{{display:block;width:100%;height:auto}}
figure svg{{max-width:600px}}
.wide{{overflow-x:auto}}
.wide svg{{min-width:430px}}
.paper{{background:#fff;border:1px solid var(--rule);border-radius:10px;padding:10px;max-width:640px}}
.scroll{{overflow-x:auto;max-width:100%}}
table{{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums;margin:8px 0}}
th,td{{padding:5px 14px 5px 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--rule)}}
th{{font-weight:600;color:var(--muted);white-space:nowrap}}
td.number,th.number{{text-align:right;white-space:nowrap}}
td.text{{overflow-wrap:break-word}}
.facts td:last-child{{overflow-wrap:anywhere}}
tr:last-child td{{border-bottom:0}}
.columns{{columns:2 340px;column-gap:36px}}
.columns section{{break-inside:avoid}}
.columns h3{{margin-top:0}}
.columns table{{margin-bottom:20px;width:100%}}
code,pre{{font:.86rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}}
pre{{background:var(--raised);border:1px solid var(--rule);border-radius:10px;padding:12px 14px;white-space:pre-wrap;
  overflow-wrap:anywhere;margin:8px 0}}
.hash{{overflow-wrap:anywhere;font:.82rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}}
footer{{color:var(--muted);font-size:.85rem;margin-top:48px;border-top:1px solid var(--rule);padding-top:12px}}
@media (max-width:600px){{main{{padding:20px 16px 48px}}h1{{font-size:1.4rem}}.tile b{{font-size:1.2rem}}
  .tiles{{grid-template-columns:1fr 1fr}}.columns{{columns:1}}table{{font-size:.8rem}}
  th,td{{padding-right:10px}}.paper{{padding:4px}}}}
@media print{{:root{{color-scheme:light;{_variables(LIGHT)}}}nav{{display:none}}h2{{break-after:avoid}}
  figure,tr{{break-inside:avoid}}main{{max-width:none;padding:0}}}}
"""
