"""How the page looks: colours for light and dark, a narrow column for phones, and paper."""

STYLE = """
:root{--ground:#fff;--panel:#f6f7f9;--text:#1b1f24;--faint:#5c6570;--line:#d9dee4;--c1:#1f66d1;--c2:#b4610a;
--c3:#2a7d4f;--c4:#8a4fc0;--good:#2a7d4f;--bad:#c0362c;--open:#6b7480;--up:210,110,20;--down:40,110,220}
@media screen and (prefers-color-scheme:dark){:root{--ground:#14171b;--panel:#1c2127;--text:#e4e8ec;--faint:#98a3ae;
--line:#333b44;--c1:#6fa8ff;--c2:#f0a04b;--c3:#62c08d;--c4:#c49af0;--good:#62c08d;--bad:#ff7a6e;--open:#98a3ae;
--up:255,160,70;--down:110,165,255}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--text);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;-webkit-text-size-adjust:100%}
main{max-width:1120px;margin:0 auto;padding:24px 20px 40px}
h1{font-size:26px;line-height:1.2;margin:0 0 6px;overflow-wrap:anywhere}
h2{font-size:18px;margin:36px 0 10px}
h3{font-size:15px;margin:22px 0 8px}
ul{list-style:none;margin:0;padding:0}
.facts{display:flex;flex-wrap:wrap;gap:2px 18px;color:var(--faint);overflow-wrap:anywhere}
.note,footer{color:var(--faint);font-size:13px}
.verdict{margin:18px 0;padding:12px 16px;border-left:5px solid var(--open);background:var(--panel);
border-radius:0 6px 6px 0}
.verdict p{margin:0;font-size:17px}
.verdict.good{border-color:var(--good)}.verdict.good strong{color:var(--good)}
.verdict.bad{border-color:var(--bad)}.verdict.bad strong{color:var(--bad)}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(138px,1fr));gap:10px}
.tiles li{background:var(--panel);border-radius:6px;padding:10px 12px;display:flex;flex-direction:column}
.tiles b{font-size:22px;font-weight:600;font-variant-numeric:tabular-nums;line-height:1.25}
.tiles span{font-size:13px}.tiles small{color:var(--faint);font-size:12px}
.alarms li{border-left:4px solid var(--bad);padding:2px 0 2px 12px;margin:10px 0}
.alarms li.off{border-color:var(--line)}
.alarms p{margin:2px 0}.alarms .when{color:var(--faint)}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(320px,100%),1fr));gap:14px}
figure{margin:0;background:var(--panel);border-radius:6px;padding:10px 10px 4px;break-inside:avoid}
figcaption{display:flex;gap:8px;align-items:baseline;font-size:14px;padding:0 4px;flex-wrap:wrap}
figcaption span{color:var(--faint);font-size:13px}
figcaption em{margin-left:auto;font-style:normal;font-weight:600;font-variant-numeric:tabular-nums}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:14px;margin:0 0 6px}
.legend.small{font-size:12px;padding:0 4px;margin:0}
.legend i{display:inline-block;width:20px;height:0;border-top:3px solid;margin-right:6px;vertical-align:middle}
.legend i.dashed{border-top-style:dashed}
i.c1{color:var(--c1)}i.c2{color:var(--c2)}i.c3{color:var(--c3)}i.c4{color:var(--c4)}
svg{display:block;width:100%;height:auto;font:11px system-ui,sans-serif}
.narrow{display:none}
.rule{stroke:var(--line);stroke-width:1;fill:none}
.axis{stroke:var(--faint);stroke-width:1;fill:none}
.tick,.name{fill:var(--faint)}
.small{font-size:10px;fill:var(--faint);paint-order:stroke;stroke:var(--panel);stroke-width:3px}
.line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.line.dashed{stroke-dasharray:5 4}
.line.c1{stroke:var(--c1)}.line.c2{stroke:var(--c2)}.line.c3{stroke:var(--c3)}.line.c4{stroke:var(--c4)}
.dot.c1,.band.c1,text.c1{fill:var(--c1)}.dot.c2,.band.c2,text.c2{fill:var(--c2)}
.dot.c3,.band.c3,text.c3{fill:var(--c3)}.dot.c4,.band.c4,text.c4{fill:var(--c4)}
.band{opacity:.15;stroke:none}
.spot{fill:transparent}
.level{stroke:var(--bad);stroke-width:1;stroke-dasharray:3 3;fill:none}
.mark{stroke:var(--bad);stroke-width:1.5;fill:none}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(420px,100%),1fr));gap:12px}
article{background:var(--panel);border-radius:6px;padding:10px 12px;break-inside:avoid;min-width:0}
article .note{margin:6px 0 0}
pre{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate;
font:13px/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
.prompt{color:var(--faint);border-left:3px solid var(--line);padding-left:8px;margin:0 0 6px}
.pair{margin:0 0 18px}
.up1{background:rgba(var(--up),.15)}.up2{background:rgba(var(--up),.3)}.up3{background:rgba(var(--up),.45)}
.up4{background:rgba(var(--up),.6)}.down1{background:rgba(var(--down),.15)}.down2{background:rgba(var(--down),.3)}
.down3{background:rgba(var(--down),.45)}.down4{background:rgba(var(--down),.6)}
i.up{background:rgba(var(--up),.3);font-style:normal}i.down{background:rgba(var(--down),.3);font-style:normal}
summary{cursor:pointer;color:var(--faint)}details pre{margin-top:10px}
code{font:.92em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
footer{margin-top:40px;border-top:1px solid var(--line);padding-top:10px}
@media (max-width:640px){main{padding:16px 12px 32px}.wide{display:none}.narrow{display:block}h1{font-size:22px}}
@page{margin:14mm}
@media print{main{max-width:none;padding:0}body{font-size:12px}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
.cards{grid-template-columns:1fr 1fr}.grid{grid-template-columns:repeat(3,1fr)}
section.whole,.alarms li{break-inside:avoid}h2,h3{break-after:avoid}}
"""
