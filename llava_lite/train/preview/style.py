"""The style of what the page of a run's report does not have: records, their tokens, and their images."""

BATCH_CSS = """
:root { --learn: #d7f2df; --learn-ink: #0e4a27; --image: #e3e9fb; --image-ink: #23408e; --gone: #9a5b00; }
@media (prefers-color-scheme: dark) {
  :root { --learn: #153d27; --learn-ink: #a5efc3; --image: #1f2c50; --image-ink: #b9ccff; --gone: #f0b454; }
}
.record { margin: 1rem 0; padding: .8rem 1rem; border-radius: .5rem; background: var(--card); }
.record h3 { margin: 0; overflow-wrap: anywhere; }
.record .where { margin-left: .7rem; color: var(--muted); font-size: .85rem; font-weight: 400; }
.record .note { margin: .15rem 0 .6rem; }
.problem { color: var(--bad); }
.marks { display: flex; flex-wrap: wrap; gap: .4rem 1.6rem; margin: .6rem 0; padding: 0; list-style: none; }
.tokens {
  white-space: pre-wrap; overflow-wrap: anywhere;
  font: .86rem/1.75 ui-monospace, "SF Mono", Menlo, Consolas, monospace;
}
.piece { padding: .1rem 0; border-radius: .15rem; }
.marks .piece { padding: .1rem .4rem; font: .86rem ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.piece.text { color: var(--muted); }
.piece.supervised { background: var(--learn); color: var(--learn-ink); box-decoration-break: clone; }
.piece.image, .piece.padding { margin: 0 .2rem; }
.piece b { padding: .1rem .5rem; border-radius: .3rem; font-weight: 500; white-space: nowrap; }
.piece.image b, .marks .piece.image { background: var(--image); color: var(--image-ink); }
.piece.padding b { border: 1px dashed var(--faint); color: var(--muted); }
.piece.cut { color: var(--gone); }
.piece.cut:not(:has(b)) { text-decoration: line-through; }
.piece.cut b { margin: 0 .2rem; border: 1px solid currentColor; }
.images { display: flex; flex-wrap: wrap; gap: 1rem; margin: .6rem 0 .8rem; }
.shown { margin: 0; max-width: 100%; }
.shown figcaption { margin: .3rem 0 0; color: var(--muted); font-size: .8rem; }
.crops { display: flex; flex-wrap: wrap; align-items: flex-start; gap: .6rem; }
.crops img { display: block; width: 9rem; max-width: 100%; border-radius: .2rem; }
.exact img { image-rendering: pixelated; }
.tiles { display: grid; grid-template-columns: repeat(var(--columns), auto); gap: 2px; }
.tiles img { width: min(6rem, 78vw / var(--columns)); border-radius: 0; }
@media (max-width: 40rem) { .record { padding: .7rem; } }
"""
