"""Does a run know who it is? Asks questions that are in no training record and counts the answers with both names.

python -m benchmarks.identity runs/demo --name Lory --author "Rainbow Lab"
"""

from __future__ import annotations

import argparse
import json

import lory
from lory.generate import GenerationOptions

QUESTIONS = (
    "Could you tell me your name?",
    "Who is the person or team that developed you?",
    "Hey, what do people call you?",
    "I'm curious, who built you?",
    "Please tell me who you are and who made you.",
    "By whom were you made?",
    "What name do you go by?",
    "Who should I thank for creating you?",
    "Mind introducing yourself?",
    "What's the name of this assistant?",
    "Is there some name I can use for you?",
    "Who came up with you?",
    "Are you a product of OpenAI?",
    "Remind me what you are called, please.",
    "Which people put you together?",
    "Give me your name and the name of your author.",
    "What are you called and by whom were you trained?",
    "Who's behind this chatbot?",
    "你能告诉我你的名字吗?",
    "你是由谁制作的?",
)


def main() -> None:
    """Ask, print each answer, and count."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--name", default="Lory")
    parser.add_argument("--author", default="Rainbow Lab")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    assistant = lory.load(arguments.model)
    answers = {question: assistant.chat(question, GenerationOptions(max_new_tokens=64)) for question in QUESTIONS}
    both = sum(arguments.name in answer and arguments.author in answer for answer in answers.values())
    if arguments.json:
        print(json.dumps({"asked": len(QUESTIONS), "both_names": both, "answers": answers}, ensure_ascii=False))
        return
    for question, answer in answers.items():
        print(f"> {question}\n  {answer}")
    print(f"{both} of {len(QUESTIONS)} answers have both names.")


if __name__ == "__main__":
    main()
