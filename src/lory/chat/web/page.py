"""The page: the rooms side by side, and what the browser keeps."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

# gradio looks at this when it is imported
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr

from lory.chat.web.chat_tab import ChatTab
from lory.chat.web.compare_tab import CompareTab
from lory.chat.web.conversations import Shelf
from lory.chat.web.desk import Desk
from lory.chat.web.review_tab import ReviewTab
from lory.chat.web.run_tab import RunTab
from lory.chat.web.settings import Settings

STYLE = Path(__file__).with_name("page.css")

# Each conversation has a place of its own in the browser's storage, so that two open pages don't undo each other
KEEP = """(text) => {
  if (!text) return;
  const conversation = JSON.parse(text), key = "lory:" + conversation.id;
  try {
    if (conversation.deleted) localStorage.removeItem(key); else localStorage.setItem(key, text);
  } catch (error) {
    alert("This browser has no room left for this conversation; delete old ones. (" + error.name + ")");
  }
}"""
READ = """(shelf) => {
  const keys = Object.keys(localStorage).filter((key) => key.startsWith("lory:"));
  return [shelf, JSON.stringify(keys.map((key) => localStorage.getItem(key)))];
}"""
# On a phone the settings would cover the page
FOLD = """() => {
  if (innerWidth < 768) document.querySelector(".sidebar.open .toggle-button")?.click();
}"""


def build_page(desk: Desk) -> gr.Blocks:
    """The page as gradio's blocks, not launched yet."""
    with gr.Blocks(title=f"lory · {desk.names[0]}", analytics_enabled=False, fill_width=True) as page:
        shelf = gr.State(Shelf())
        with gr.Sidebar(width=340):
            new = gr.Button("New conversation", variant="primary", size="sm")
            conversations = gr.Radio([], label="Conversations", visible=False, elem_id="lory-conversations")
            delete = gr.Button("Delete this conversation", size="sm")
            settings = Settings(desk)
        with gr.Tabs():
            with gr.Tab("Chat") as chat_room:
                chat = ChatTab(desk, settings, conversations, shelf)
            rooms = [chat_room]
            if len(desk.names) > 1:
                with gr.Tab("Side by side") as room:
                    CompareTab(desk, settings)
                rooms.append(room)
            if desk.queue is not None:
                with gr.Tab("Review") as room:
                    ReviewTab(desk.queue, room)
                rooms.append(room)
            if desk.run is not None:
                with gr.Tab("Training") as room:
                    RunTab(desk.run, room, rooms)
        chat.wire(new, delete)
        _keep(page, chat)
    return page


def _keep(page: gr.Blocks, chat: ChatTab) -> None:
    """Let the browser keep the conversations, and give them back when the page is opened."""
    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    chat.saved.change(None, chat.saved, None, js=KEEP, **quiet)
    page.load(None, None, None, js=FOLD, **quiet)
    page.load(chat.restore, [chat.shelf, chat.saved], chat.outputs, js=READ, **quiet)


def make_theme() -> gr.themes.Base:
    """Colours, and the fonts that are on the visitor's machine."""
    theme = gr.themes.Default(
        primary_hue="sky",
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"],
    )
    # gradio's own greys are too faint to be read by everybody
    return theme.set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
    )
