"""Definitions of other languages become rows, each with the comment before it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from engine.data.makers import syntax_trees
from engine.data.makers.code import ExtractLimits
from engine.data.makers.syntax_trees import GRAMMARS, missing_grammar, tree_rows

SAMPLES = {
    "a.js": (
        """
        // A licence that says nothing of what follows it.

        /**
         * Add two numbers and say so.
         * @param {number} a
         */
        export function add(a, b) {
          return a + b;
        }
        class Box {
          // Open the box with both hands.
          open(lid) {
            return lid;
          }
          #hidden() { return 1; }
        }
        """,
        {
            "function `add`": "Add two numbers and say so.\n@param {number} a",
            "method `Box.open`": "Open the box with both hands.",
        },
    ),
    "a.ts": (
        """
        /** What a shape must be able to say. */
        export interface Shape {
          area(): number;
          name: string;
        }
        export abstract class Base {
          /** The name that people see. */
          label(): string {
            return "x";
          }
        }
        """,
        {
            "interface `Shape`": "What a shape must be able to say.",
            "method `Base.label`": "The name that people see.",
        },
    ),
    "a.go": (
        """
        package a

        // Area returns the area of a square.
        // It is never negative.
        func (s *Square) Area() float64 {
            return s.side * s.side
        }

        // Square has four equal sides.
        type Square struct {
            side float64
        }
        """,
        {
            "method `Square.Area`": "Area returns the area of a square.\nIt is never negative.",
            "type `Square`": "Square has four equal sides.",
        },
    ),
    "a.rs": (
        """
        /// A point in the plane, by two numbers.
        #[derive(Debug)]
        pub struct Point {
            x: f64,
        }
        impl Point {
            /// The distance from the origin.
            pub fn norm(&self) -> f64 {
                self.x.abs()
            }
        }
        """,
        {
            "struct `Point`": "A point in the plane, by two numbers.",
            "method `Point.norm`": "The distance from the origin.",
        },
    ),
    "A.java": (
        """
        /** Counts things that are seen. */
        public class Counter {
            /**
             * Count one more of them.
             */
            @Override
            public int next() {
                return 1;
            }
        }
        """,
        {
            "class `Counter`": "Counts things that are seen.",
            "method `Counter.next`": "Count one more of them.",
        },
    ),
    "a.c": (
        """
        /* Return the larger of two numbers. */
        static int max(int a, int b)
        {
            return a > b ? a : b;
        }
        """,
        {"function `max`": "Return the larger of two numbers."},
    ),
    "a.cpp": (
        """
        namespace geo {
        /// A line between two points.
        class Line {
         public:
          /// The length of the line.
          double length() const {
            return 1.0;
          }
        };
        }
        /// The middle of a given line.
        template <typename T>
        T geo::middle(T a) {
          return a;
        }
        """,
        {
            "class `Line`": "A line between two points.",
            "method `Line.length`": "The length of the line.",
            "method `geo.middle`": "The middle of a given line.",
        },
    ),
    "a.rb": (
        """
        # A stack of things, last in first out.
        class Stack
          # Put one thing on top of the stack.
          def push(x)
            @all << x
          end
        end
        """,
        {
            "class `Stack`": "A stack of things, last in first out.",
            "method `Stack.push`": "Put one thing on top of the stack.",
        },
    ),
    "a.cs": (
        """
        namespace A {
            /// <summary>
            /// Greets people by their name.
            /// </summary>
            public class Greeter {
                /// <summary>Say hello to somebody.</summary>
                public string Hello(string name) {
                    return "Hello " + name;
                }
            }
        }
        """,
        {
            "class `Greeter`": "Greets people by their name.",
            "method `Greeter.Hello`": "Say hello to somebody.",
        },
    ),
}
LIMITS = ExtractLimits(fewest_lines=2)


def dedented(text: str) -> str:
    return "\n".join(line.removeprefix(" " * 8) for line in text.strip("\n").split("\n"))


@pytest.mark.parametrize("name", SAMPLES)
def test_definitions_are_named_and_described(name: str, tmp_path: Path) -> None:
    text, expected = SAMPLES[name]
    file = tmp_path / name
    file.write_text(dedented(text))
    language = GRAMMARS[file.suffix].name
    rows = tree_rows(file, "write", LIMITS, Counter())
    told = {row["prompt"].partition(".\n\n")[::2] for row in rows}
    assert told == {(f"Write the {language} {what}", about) for what, about in expected.items()}
    for row in rows:
        # The code is in the file, whole and without what stands around it.
        stripped = [line.strip() for line in row["response"].split("\n")]
        assert "\n".join(stripped) in "\n".join(line.strip() for line in text.split("\n"))
        assert row["response"][:1].strip()
    asked = [row["prompt"] for row in tree_rows(file, "describe", LIMITS, Counter())]
    assert len(asked) == len(expected)
    assert all(f"the {language} {what}" in " ".join(asked) for what in expected)


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    file = tmp_path / "a.js"
    file.write_text(
        "function bare() {\n  return 1;\n}\n\n// Too short to be an answer here.\n"
        "function one() { return 1; }\n// A name for insiders and nobody else.\n"
        "function _own() {\n  return 1;\n}\n// A broken one that nobody should learn.\n"
        "function broken( {\n  return ;;\n"
    )
    counts: Counter[str] = Counter()
    assert tree_rows(file, "write", LIMITS, counts) == []
    assert counts == {"without_a_docstring": 1, "too_short": 1, "private": 1} | {
        reason: count for reason, count in counts.items() if reason == "cannot_be_parsed"
    }


def test_a_grammar_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing_grammar(Path("a.go")) is None
    monkeypatch.setattr(syntax_trees, "find_spec", lambda name: None)
    assert missing_grammar(Path("a.go")) == "Go"
