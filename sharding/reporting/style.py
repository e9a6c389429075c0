"""The style of the report's page. Data only."""

STYLE = """
:root { --ink: #1d2330; --soft: #5b6475; --paper: #f6f7f9; --card: #fff; --line: #dfe3ea; --bar: #4a7dd6;
  --warn: #8a5a00; --warn-paper: #fff4dc; --bad: #b3261e }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #9aa4b5; --paper: #13161c; --card: #1b2028;
  --line: #2d3440; --bar: #6d9cf0; --warn: #f2c46d; --warn-paper: #33290f; --bad: #ff8a80 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 90rem; font: 15px/1.45 system-ui, sans-serif; color: var(--ink);
  background: var(--paper) }
h1 { margin: 0; font-size: 1.6rem } h2 { margin: 0 0 .5rem; font-size: 1.05rem }
h3 { margin: 1rem 0 .4rem; font-size: .95rem }
.account { margin: .2rem 0 1rem; color: var(--soft) } .wrong { color: var(--bad) }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); gap: .75rem; margin-bottom: 1rem }
.tiles div, section { background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; padding: .8rem 1rem }
.tiles b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums }
.tiles span, section p { color: var(--soft); font-size: .85rem } section p { margin: .5rem 0 0 }
.warning { margin: 0 0 .75rem; padding: .5rem 1rem; border-radius: .5rem; color: var(--warn);
  background: var(--warn-paper) }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%), 1fr)); gap: .75rem }
.wide { grid-column: 1 / -1 } body > section { margin-top: .75rem }
.scroll { overflow-x: auto } section { min-width: 0 }
table { border-collapse: collapse; width: 100%; font-size: .9rem }
th, td { padding: .2rem .6rem .2rem 0; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap }
th { color: var(--soft); font-weight: 500 } .n { text-align: right; font-variant-numeric: tabular-nums }
tfoot td { font-weight: 600; border-bottom: 0 } tr.missing td { color: var(--warn); font-weight: 600 }
td.bar, th.bar { width: 35%; min-width: 3rem; padding-right: 0 } .bar svg { display: block; fill: var(--bar) }
.pictures { display: flex; flex-wrap: wrap; gap: .6rem } figure { margin: 0; width: 12rem }
figure img { display: block; max-width: 100%; height: auto; border-radius: .3rem; background: var(--line) }
figcaption { margin-top: .2rem; color: var(--soft); font-size: .75rem; overflow-wrap: anywhere; max-height: 4.4em;
  overflow: hidden }
.gone { padding: 3rem 0; text-align: center; color: var(--soft); background: var(--line); border-radius: .3rem }
.groups { display: flex; flex-wrap: wrap; gap: .8rem 1.6rem } .group { padding-top: .5rem }
summary { cursor: pointer; padding: .25rem 0 } details .scroll { max-height: 30rem; overflow-y: auto }
@media (max-width: 32rem) { body { padding: .6rem } figure { width: calc(50% - .3rem) } .wide td.bar { display: none }
  .wide th.bar { display: none } th, td { padding-right: .45rem } }
"""
