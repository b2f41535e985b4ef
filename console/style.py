"""The report's style sheet: light and dark, wide and narrow; Okabe and Ito's colours, which most eyes tell apart."""

STYLE = """
:root { color-scheme: light dark; --ink: #1d2329; --soft: #5b6570; --line: #d9dee3; --ground: #ffffff;
  --panel: #f5f7f8; --keep: #007a5a; --best: #0072b2; --band: #0072b226; --fail: #b34700; --plus: #0b6b50;
  --minus: #a33f00; --t1: #0072b2; --t2: #56b4e9; --t3: #009e73; --t4: #d55e00; --t5: #e69f00; --t6: #cc79a7;
  --t7: #b8c0c8 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #a3adb7; --line: #3a424b; --ground: #14181c;
  --panel: #1d2329; --keep: #3fc79c; --best: #64b5f0; --band: #64b5f033; --fail: #ff9a52; --plus: #5fd3ae;
  --minus: #ffab70; --t1: #4a9fd8; --t2: #8fd0f5; --t3: #35c196; --t7: #56606a } }
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100% }
body { margin: 0 auto; max-width: 72rem; padding: 2rem 1.25rem 4rem; color: var(--ink); background: var(--ground);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.7rem; margin: 0; letter-spacing: -.01em }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .5rem; letter-spacing: -.005em }
h3 { font-size: 1rem; margin: 1.2rem 0 .2rem }
p { margin: .4rem 0 .7rem; max-width: 46rem }
code { font: .92em ui-monospace, "SF Mono", Menlo, "Liberation Mono", monospace; background: var(--panel);
  padding: .1em .35em; border-radius: .3em; white-space: nowrap }
a { color: var(--best) }
.soft, .scale { color: var(--soft) }
.scale { margin: .15rem 0 1.2rem }
.f { font-variant-numeric: tabular-nums }
.answer { background: var(--panel); border-radius: .8rem; padding: 1.1rem 1.3rem; margin: 0 0 1.2rem;
  border-left: .35rem solid var(--soft) }
.answer.good { border-color: var(--keep) } .answer.bad { border-color: var(--fail) }
.answer .lead { font-size: 1.3rem; line-height: 1.35; margin: 0 0 .5rem; max-width: 50rem }
.answer p:last-child { margin-bottom: 0 }
.lead b { font-weight: 650; white-space: nowrap }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(7.7rem, 1fr)); gap: .7rem; margin: 0 0 1.2rem }
.tile { background: var(--panel); border-radius: .6rem; padding: .6rem .7rem }
.tile b { display: block; font-size: 1.15rem; white-space: nowrap; font-variant-numeric: tabular-nums }
.tile span.what { color: var(--soft); font-size: .87rem; line-height: 1.3; display: block }
svg { display: block; width: 100%; height: auto; overflow: visible }
svg text { fill: var(--soft); font: 12px system-ui, "Liberation Sans", sans-serif }
svg .name { fill: var(--keep); paint-order: stroke; stroke: var(--ground); stroke-width: 3px; stroke-linejoin: round }
svg .grid { stroke: var(--line) }
svg .zero { stroke: var(--soft); stroke-dasharray: 3 3 }
svg .stair { fill: none; stroke: var(--best); stroke-width: 2.5 }
svg .band { fill: var(--band); stroke: none }
svg .kept { fill: var(--keep); stroke: var(--ground); stroke-width: 1.5 }
svg .not { fill: none; stroke: var(--soft); stroke-width: 1.4 }
svg .bad { stroke: var(--fail); stroke-width: 2.2; fill: none }
svg .drift { stroke: var(--t6); stroke-width: 1.5; stroke-dasharray: 5 4 }
svg a:hover * { stroke-width: 4 }
.narrow { display: none }
.key { display: flex; flex-wrap: wrap; gap: .25rem 1.2rem; margin: .3rem 0 0; color: var(--soft); font-size: .88rem;
  max-width: none }
.key span { white-space: nowrap }
.key svg { width: 1.6rem; height: 1rem; display: inline-block; vertical-align: -2px; margin-right: .35rem }
.forest { display: grid; grid-template-columns: max-content minmax(8rem, 1fr) max-content; gap: .15rem 1rem;
  align-items: center; margin: .6rem 0 .3rem }
.forest svg .whisker { stroke: var(--ink); stroke-width: 2 } .forest svg .dot { fill: var(--ink); stroke: var(--ink) }
.forest svg .pale { fill: var(--panel); stroke: var(--soft); stroke-width: 1.8 }
.forest .entry { display: contents } .forest .figure { text-align: right; white-space: nowrap }
table { border-collapse: collapse; width: 100%; font-size: .93rem }
th { text-align: left; color: var(--soft); font-weight: 600; border-bottom: 2px solid var(--line);
  padding: .3rem .6rem; vertical-align: bottom }
td { border-bottom: 1px solid var(--line); padding: .38rem .6rem; vertical-align: top }
td.n, th.n { width: 1%; text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
td.w, th.w { width: 1%; white-space: nowrap }
td.plot { width: 24%; min-width: 8rem } td.plot svg { margin-top: .12rem }
td.without { width: 15%; min-width: 10rem } td.without .state { white-space: normal }
td svg .whisker { stroke: var(--ink); stroke-width: 2 } td svg .dot { fill: var(--ink) }
td svg .pale { fill: var(--ground); stroke: var(--soft); stroke-width: 1.8 }
tr:target { outline: 2px solid var(--best) }
.status { white-space: nowrap }
.status.keep { color: var(--keep); font-weight: 700 }
.status.bad { color: var(--fail); font-weight: 600 }
.state { white-space: nowrap } .state i { font-style: normal; display: inline-block; width: 1.1em; text-align: center }
.state.good { color: var(--keep); font-weight: 600 } .state.bad { color: var(--fail); font-weight: 600 }
.state.open { color: var(--soft) }
.bar { display: flex; height: 1.5rem; border-radius: .4rem; overflow: hidden; margin: .5rem 0 .7rem; gap: 2px }
.bar i { display: block; min-width: 2px } .swatch { display: inline-block; width: .8rem; height: .8rem;
  border-radius: .2rem; margin-right: .5rem; vertical-align: -1px }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 0 2.5rem }
details summary { cursor: pointer }
details > div { padding: .4rem 0 .6rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem .9rem; margin: .3rem 0 }
dt { color: var(--soft) } dd { margin: 0 }
pre { background: var(--panel); border-radius: .5rem; padding: .7rem .9rem; overflow-x: auto; overflow-wrap: normal;
  font-size: .82rem; margin: .5rem 0 }
.plus { color: var(--plus) } .minus { color: var(--minus) }
.curve { max-width: 34rem } .curve polyline { fill: none; stroke: var(--best); stroke-width: 2 }
ul.next { padding-left: 1.2rem; max-width: 50rem } ul.next li { margin: .3rem 0 }
.warn { border-left: .3rem solid var(--fail); padding: .1rem 0 .1rem .8rem }
footer { margin-top: 3rem; padding-top: .8rem; border-top: 1px solid var(--line); color: var(--soft);
  font-size: .87rem }
@media (max-width: 56rem) { .broad { display: none } .narrow { display: block; max-width: 36rem } }
@media (min-width: 44.01rem) { tr:has(.without) td.plot { width: 17% } tr:has(.without) td.what { min-width: 8rem } }
@media (min-width: 44.01rem) and (max-width: 56rem) { tr:has(.without) :is(td.without, td.w) { min-width: 7rem }
  tr:has(.without) td.plot { width: 15% } tr:has(.without) :is(th, .state) { white-space: normal } }
@media (max-width: 44rem) {
  body { padding: 1.2rem .9rem 3rem }
  .answer { padding: .9rem 1rem } .answer .lead { font-size: 1.15rem }
  .forest { display: block } .forest .entry { display: grid; grid-template-columns: 1fr max-content; margin: .4rem 0 }
  .forest .plot { grid-column: 1 / -1; grid-row: 2 } .key span { white-space: normal }
  table.cards, .cards tbody { display: block } .cards thead { display: none }
  .cards tr { display: block; border-bottom: 1px solid var(--line); padding: .5rem 0 }
  .cards td { display: flex; justify-content: space-between; gap: 1rem; border: 0; padding: .1rem 0; width: auto;
    min-width: 0; text-align: left; white-space: normal }
  .cards td::before { content: attr(data-label); color: var(--soft); flex: none }
  .cards td > div { text-align: right; min-width: 0 } .cards td.plot > div { flex: 1 }
  .cards td.what { display: block } .cards td.what > div { text-align: left }
  .cards td.what::before, .cards td.head::before { content: none } .cards td.none { display: none }
  .cards td.head { display: inline-flex; margin-right: .6rem; font-weight: 650 }
  .cards td.inline { display: inline-flex; gap: .35rem; margin-right: 1.1rem; justify-content: flex-start }
  .cards td.bare::before { content: none }
  .state { white-space: normal }
}
@media print { details > div { display: block } }
"""
