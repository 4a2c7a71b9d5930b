"""The page's one style sheet: system fonts, colours for light and dark, readable on a phone and on paper."""

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --quiet: #5c646c; --paper: #ffffff; --card: #f5f6f8; --rule: #d9dde2; --bad: #c01c28;
  --c0: #1f5fae; --c1: #b3500f; --c2: #2a7a3f; --c3: #85459c; --c4: #a8256a; --c5: #5f6670; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --quiet: #a2a9b1; --paper: #15181b; --card: #1f2327; --rule: #3a4047; --bad: #ff7b82;
  --c0: #79b2f2; --c1: #f0a268; --c2: #7fd094; --c3: #cf9ce6; --c4: #f48fbd; --c5: #b4bac1; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main, footer { max-width: 1080px; margin: 0 auto; padding: 0 16px; }
h1 { font-size: 1.6rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; padding-bottom: .2rem; border-bottom: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 0 0 .4rem; }
footer, figcaption, caption, .quiet, dt { color: var(--quiet); font-size: .875rem; }
figure { margin: 0; background: var(--card); border-radius: 8px; padding: 12px; }
figcaption p { margin: .2rem 0 0; }
svg { display: block; width: 100%; height: auto; }
svg text { font: 13px system-ui, sans-serif; fill: var(--ink); }
svg text.small { font-size: 11px; } svg text.quiet { fill: var(--quiet); }
.grid-of-two { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
.tiles { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); margin: 1rem 0; }
.tiles div { background: var(--card); border-radius: 8px; padding: 8px 12px; }
dd { margin: 0; font-size: 1.1rem; font-weight: 600; overflow-wrap: anywhere; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; list-style: none; margin: 6px 0 0; padding: 0; }
.legend li { display: flex; align-items: center; gap: 6px; overflow-wrap: anywhere; } .swatch { width: 24px; height: 10px; flex: none; }
.grid { stroke: var(--rule); stroke-width: 1; } .mark { stroke: var(--bad); stroke-width: 1.5; stroke-dasharray: 2 3; }
.line { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; } .faint { stroke-width: 1; opacity: .45; }
.dot, .fill { fill: var(--c); } .bad { fill: var(--bad); }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); } .c3 { --c: var(--c3); } .c4 { --c: var(--c4); } .c5 { --c: var(--c5); }
.d1 { stroke-dasharray: 7 3; } .d2 { stroke-dasharray: 2 3; }
.scroll { overflow-x: auto; margin: .6rem 0; } table { border-collapse: collapse; font-size: .875rem; min-width: 50%; }
caption { text-align: left; padding-bottom: 4px; }
th, td { text-align: left; padding: 4px 14px 4px 0; border-bottom: 1px solid var(--rule); vertical-align: top; font-weight: 400; }
td { overflow-wrap: anywhere; } thead th { font-weight: 600; white-space: nowrap; } .number { text-align: right; white-space: nowrap; }
pre { background: var(--card); border-radius: 8px; padding: 12px; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .875rem; }
details { margin: .8rem 0; } summary { cursor: pointer; color: var(--c0); }
summary:focus-visible, .scroll:focus-visible { outline: 2px solid var(--c0); }
.problems { border-left: 4px solid var(--bad); background: var(--card); padding: 8px 12px 8px 32px; border-radius: 4px; }
@media print { figure, pre { break-inside: avoid; } }
"""
