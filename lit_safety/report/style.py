"""The look of index.html: light and dark, readable on a phone, nothing loaded from anywhere."""

STYLE = """
:root{--ink:#181b22;--soft:#5b6270;--line:#dfe2e8;--paper:#fff;--card:#f6f7f9;--bad:#c81e2c;--good:#11795b;
--c0:#6b7280;--c1:#1f6feb;--c2:#b45309;--c3:#7c3aed;--c4:#0f766e;--c5:#be185d;
--c6:#15803d;--c7:#7f1d1d;--c8:#0369a1;--c9:#a16207}
@media(prefers-color-scheme:dark){:root{--ink:#e8eaef;--soft:#a3aab8;--line:#333844;--paper:#14161b;--card:#1d2027;
--bad:#ff6b74;--good:#4cc79c;--c0:#9aa1ae;--c1:#6ea8ff;--c2:#f0a44b;--c3:#b794ff;--c4:#4fd1c5;--c5:#f78fb3;
--c6:#86d993;--c7:#f2a0a0;--c8:#7dc8f0;--c9:#e0c060}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:72rem;padding:1.2rem 1rem 4rem;font:16px/1.5 system-ui,sans-serif;color:var(--ink);
background:var(--paper)}
h1{font-size:1.7rem;line-height:1.2;margin:.4rem 0;overflow-wrap:anywhere}h2{margin:2.4rem 0 .6rem;font-size:1.3rem}
h3{margin:1.4rem 0 .4rem;font-size:1.05rem}
.soft{color:var(--soft)}.lead{font-size:1.1rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(13rem,1fr));gap:.8rem;margin:1rem 0}
.tile{background:var(--card);border-radius:.7rem;padding:.8rem 1rem}
.tile b{display:block;font-size:1.6rem;line-height:1.25}
.figure{border-top:1px solid var(--line);padding:.7rem 0}
.figure h3{margin:0}.figure p{margin:0 0 .4rem;font-size:.9rem;color:var(--soft)}
table{border-collapse:collapse;width:100%}
th,td{text-align:left;padding:.25rem .6rem .25rem 0;vertical-align:middle;font-weight:400}
.figure th{width:8.5rem;overflow-wrap:anywhere}.figure td.num{width:12rem;font-variant-numeric:tabular-nums;
white-space:nowrap}
.figure td.diff{width:15rem;font-size:.9rem;font-variant-numeric:tabular-nums;white-space:nowrap}
caption{text-align:left;font-size:.85rem;color:var(--soft);padding-top:.4rem}
.num b{font-weight:650}.num span{color:var(--soft);font-size:.85rem;white-space:nowrap}
.bar{position:relative;height:.9rem;min-width:5rem;background:var(--card);border-radius:.2rem}
.bar i{position:absolute;inset:0 auto 0 0;border-radius:.2rem;min-width:2px}
.bar u{position:absolute;top:50%;height:2px;background:var(--ink);transform:translateY(-50%)}
.bar u::before,.bar u::after{content:"";position:absolute;width:2px;height:.55rem;top:-.21rem;background:var(--ink)}
.bar u::before{left:0}.bar u::after{right:0}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:1rem}
figure.wide{max-width:none;min-width:0}.chart{width:100%;max-width:38rem;height:auto;display:block;
font-size:15px}
.chart text{fill:var(--ink);paint-order:stroke;stroke:var(--paper);stroke-width:3px}
.chart .axis{fill:var(--soft)}.chart .grid{stroke:var(--line)}
.chart .lead{stroke:var(--soft)}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.2rem 1rem;padding:0;margin:.3rem 0}
.legend i{display:inline-block;width:.8rem;height:.8rem;border-radius:50%;margin-right:.35rem;vertical-align:-.05rem}
.scroll{overflow-x:auto}.scroll td,.scroll th{white-space:nowrap;font-variant-numeric:tabular-nums}
.arms th[scope=col]{vertical-align:bottom;white-space:normal;min-width:6rem;font-size:.85rem;color:var(--soft)}
.arms th[scope=row]{font-weight:600;position:sticky;left:0;background:var(--paper)}
.arms td span{color:var(--soft);font-size:.8rem}
.arms tr+tr{border-top:1px solid var(--line)}
.up{color:var(--good)}.down{color:var(--bad)}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,calc(var(--arms)*7rem + 1.5rem)),
1fr));gap:1rem}
.pair{background:var(--card);border-radius:.7rem;padding:.7rem}
.pair p{margin:0 0 .5rem;font-size:.92rem}
.row{display:grid;grid-template-columns:repeat(auto-fit,minmax(6.5rem,1fr));gap:.5rem}
figure{margin:0;max-width:12rem}
figcaption{font-size:.82rem;color:var(--soft);overflow-wrap:anywhere}
img{width:100%;display:block;border-radius:.35rem;background:var(--line)}img.small{image-rendering:pixelated}
.veil{position:relative;display:block;cursor:pointer;overflow:hidden;border-radius:.35rem;
outline:3px solid var(--bad);outline-offset:-3px}
.veil input{position:absolute;opacity:0;inset:0;width:100%;height:100%;margin:0;cursor:pointer}
.veil img{filter:blur(1.1rem)}.veil input:checked~img{filter:none}
.veil span{position:absolute;inset:auto 0 .4rem;text-align:center;font-size:.8rem;color:#fff;
text-shadow:0 0 .3rem #000,0 0 .3rem #000;pointer-events:none}
.veil input:checked~span,body:has(#all:checked) .veil span{display:none}
body:has(#all:checked) .veil img{filter:none}
.veil:focus-within{box-shadow:0 0 0 3px var(--c1)}
.harm{color:var(--bad);font-weight:600}.none{aspect-ratio:1;display:grid;place-items:center;border-radius:.35rem;
background:var(--line);font-size:.85rem;padding:.5rem;text-align:center}
.alarm{border-left:.3rem solid var(--bad);padding:.4rem .8rem;background:var(--card)}
dl{display:grid;grid-template-columns:minmax(8rem,auto) 1fr;gap:.2rem 1rem;font-size:.9rem}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere;font-family:ui-monospace,monospace;font-size:.85rem}
dd details{border:0;padding:0}
section details,main>details{border-top:1px solid var(--line);padding:.6rem 0}summary{cursor:pointer;font-weight:600}
@media(max-width:40rem){h1{font-size:1.35rem}
.figure th{width:5.5rem}.figure tr{display:grid;grid-template-columns:5.5rem 1fr;
align-items:center;padding:.2rem 0}
.figure td{padding:.1rem 0}.figure td.num,.figure td.diff{grid-column:2;width:auto;white-space:normal}
.figure td.diff:empty{display:none}.tiles{grid-template-columns:1fr 1fr}.tile{padding:.6rem .7rem}
.tile b{font-size:1.15rem}
.pictures{grid-template-columns:1fr}dl{grid-template-columns:1fr}dd{margin-bottom:.4rem}}
"""
