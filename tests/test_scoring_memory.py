"""Scoring under a limit of memory that the larger batches really exceed: the run is kept, in smaller batches."""

from __future__ import annotations

from dataclasses import replace

MIB = 2**20
LOGITS = "    def logits(self, tokens):\n"


def needing(tiny_recipe: str, line: str) -> str:
    """The recipe with a line at the start of its logits; B is the rows it was given."""
    return tiny_recipe.replace(LOGITS, LOGITS + "        B = tokens.shape[0]\n" + f"        {line}\n")


HUNGRY = {  # at 16 rows: more than the limit, which ends the process; more than there are addresses, which raises
    "limit": f"held = torch.ones(B * {160 * MIB}, dtype=torch.uint8)",
    "allocator": "held = torch.empty(2**50 if B > 4 else 1)",
}


def test_scoring_that_runs_out_of_memory_goes_on_with_half_of_the_rows(run_recipe, settings, tiny_recipe, tmp_path):
    small = replace(settings, memory_limit=2100 * MIB, audit_points=64)
    plain = run_recipe(tiny_recipe, settings=small, workdir=tmp_path / "plain")
    assert plain.describe["scored_rows"] == 16 and "scored_rows_reason" not in plain.describe
    for how, rows in (("limit", 8), ("allocator", 4)):
        outcome = run_recipe(needing(tiny_recipe, HUNGRY[how]), settings=small, workdir=tmp_path / how)
        assert outcome.status == "scored", outcome.reason
        assert outcome.audited and outcome.scored_tokens >= 4000
        assert outcome.describe["scored_rows"] == rows
        assert "memory" in outcome.describe["scored_rows_reason"]
        assert plain.scored_tokens == outcome.scored_tokens and plain.total_bytes == outcome.total_bytes


def test_what_does_not_fit_row_by_row_is_a_crash_that_says_so(run_recipe, settings, tiny_recipe):
    outcome = run_recipe(needing(tiny_recipe, "held = torch.empty(2**50)"), settings=replace(settings, logits_bytes=1))
    assert outcome.status == "crash" and outcome.describe["scored_rows"] == 1
    assert "allocate" in outcome.reason and "line" in outcome.reason


def test_an_auditor_that_runs_out_of_memory_gets_no_other_questions(run_recipe, settings, tiny_recipe):
    """It could choose the questions that suit it."""
    source = needing(tiny_recipe, "self.calls = getattr(self, 'calls', 0) + 1")
    source = source.replace(
        "        return self.model(tokens)\n",
        "        if self.calls > 6:\n            torch.empty(2**50)\n        return self.model(tokens)\n",
    )
    many = replace(settings, audit_points=256, logits_bytes=64 * 64 * 512 * 4, eval_tokens=64 * 64 * 4)
    outcome = run_recipe(source, settings=many)
    assert outcome.status == "crash" and not outcome.audited
    assert outcome.describe["scored_rows"] == 64 and "allocate" in outcome.reason
