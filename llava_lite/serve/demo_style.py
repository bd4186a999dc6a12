"""Say how the page looks: its style sheet, and what its browser may load."""

# System fonts alone, and the browser itself refuses what another host would send: gradio's page names Google's fonts,
# and an answer may hold an image of any address. Its program needs eval, its components blob: and data:.
CONTENT_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self' data: blob:; "
    "frame-ancestors 'self'; form-action 'self'"
)
FONTS = ("system-ui", "sans-serif")
MONO_FONTS = ("ui-monospace", "monospace")
SWITCH_THEME = "() => { document.body.classList.toggle('dark'); }"
CSS = """
body { background: var(--body-background-fill) !important; }
/* A width, for with auto margins in gradio's flex column it would be as narrow as an empty chat. Overflow is not
   hidden, with which nothing inside could be sticky. */
.gradio-container { width: 100% !important; max-width: 1280px !important; margin: 0 auto !important;
    overflow: clip !important; }
#head { align-items: center; }
#head h1 { font-size: 1.25rem; margin: 0; }
#theme { min-width: 7rem; max-width: 9rem; }
/* A word without a place to break would make the page wider than a phone. */
.chat .message *, #head * { overflow-wrap: anywhere !important; }
#composer { position: sticky; bottom: 0; z-index: 20; gap: 0.5rem; padding: 0.5rem 0;
    background: var(--body-background-fill); }
/* It would send an image to Hugging Face. */
.chat button[title*="hare"], .chat button[aria-label*="hare"] { display: none !important; }
/* gradio would cover every panel with the word Error where a question finds the queue full; its message says so. */
[data-testid="status-tracker"]:has(> .error) { display: none !important; }
#notice [role="alert"] { border-left: 4px solid #d9480f; background: rgba(217, 72, 15, 0.12); padding: 0.5rem 0.75rem;
    border-radius: 4px; color: var(--body-text-color); overflow-wrap: anywhere; }
.routing { font-size: 0.8rem; color: var(--body-text-color); }
.routing summary { cursor: pointer; font-weight: 600; }
.routing p { margin: 0.2rem 0 0.4rem; }
.routing-key { display: flex; flex-wrap: wrap; gap: 0.15rem 0.8rem; margin-bottom: 0.4rem; }
.routing-key span { display: inline-flex; align-items: center; gap: 0.3rem; white-space: nowrap; }
.routing-key i { width: 0.8rem; height: 0.8rem; border-radius: 2px; display: inline-block; }
.routing-layer { display: flex; gap: 0.5rem; align-items: center; padding: 0.15rem 0; }
.routing-layer > b { flex: 0 0 4rem; font-weight: 500; }
.routing-layer > div { flex: 1; min-width: 0; }
.routing-row { display: flex; gap: 0.4rem; align-items: center; }
.routing-row em { flex: 0 0 2.8rem; font-style: normal; opacity: 0.8; }
.routing-bar { flex: 1; display: flex; height: 1.15rem; margin: 1px 0; border-radius: 3px; overflow: hidden; }
.routing-bar span { overflow: hidden; text-align: center; font-size: 0.7rem; line-height: 1.15rem;
    color: #111 !important; }
@media (max-width: 640px) {
    .gradio-container, .gradio-container .main { padding: 0.4rem !important; }
    #head > * { min-width: 0 !important; }
    .chat { height: 45vh !important; min-height: 16rem !important; }
}
"""
