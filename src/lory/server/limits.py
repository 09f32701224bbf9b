"""What a server grants: how much one request may ask for, and how many there may be at a time."""

from __future__ import annotations

from pydantic import Field

from lory.config import Section


class Limits(Section):
    """The limits of a server."""

    max_batch: int = Field(8, ge=1, description="Answers that are decoded at a time.")
    queue: int = Field(64, ge=0, description="Answers that wait for a place; a request for more gets status 429.")
    body_bytes: int = Field(2**22, ge=1024, description="Largest body of a request, in bytes.")
    prompt_tokens: int | None = Field(None, ge=1, description="Longest prompt; by default the model's context.")
    answer_tokens: int = Field(4096, ge=1, description="Largest max_tokens that a request may give.")
    choices: int = Field(8, ge=1, description="Largest n; it is never above max_batch.")
    prompts: int = Field(16, ge=1, description="Most prompts in one request for completions.")
    adapters: int = Field(64, ge=0, description="Adapters beyond which clients can add no more.")
    seconds: float = Field(600, gt=0, description="Longest time that an answer is written for; it ends there.")
    held_bytes: int = Field(2**29, ge=1024, description="Bodies of all requests at a time; more get status 503.")
    queue_seconds: float = Field(60, gt=0, description="Longest time in the queue; then the status is 503.")
    grace_seconds: float = Field(30, ge=0, description="Time that running answers get when the server is to stop.")
    prefill_tokens: int = Field(64, ge=1, description="Prompt tokens that are read between two steps of the others.")
    kept_tokens: int = Field(2048, ge=0, description="Tokens of earlier conversations kept for their next question.")

    images: int = Field(8, ge=0, description="Most images in one request.")
    image_bytes: int = Field(10_000_000, ge=1, description="Largest file of an image, in bytes.")
    image_pixels: int = Field(16_000_000, ge=1, description="Most pixels of an image, before it is scaled.")
    image_links: bool = Field(False, description="Fetch images from the public web, by http and https.")
    image_seconds: float = Field(10, gt=0, description="Longest time to fetch the images of a request.")
    image_memory_bytes: int = Field(2**30, ge=1, description="Images of waiting requests; more get status 429.")

    @property
    def largest_n(self) -> int:
        """The largest n of a request."""
        return min(self.choices, self.max_batch)
