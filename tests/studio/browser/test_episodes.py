"""Episodes: the list, one prompt across iterations, and an episode as a trajectory, token by token."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect
from tests.studio.browser.conftest import Studio
from tests.studio.browser.made import ITERATIONS, SAMPLES, TEXTS

from tether.runs import StoredEpisode, read_episode, read_episodes

ALL = len(TEXTS) * SAMPLES * ITERATIONS


@pytest.fixture(scope="module")
def stored(root: Path) -> list[StoredEpisode]:
    return read_episodes(root / "ppo", limit=1000)


@pytest.fixture
def longest(stored: list[StoredEpisode]) -> StoredEpisode:
    return max(stored, key=lambda episode: episode.length)


def ids(page: Page) -> list[int]:
    return [
        int(i) for i in page.locator(".results tr[data-id]").evaluate_all("rows => rows.map(row => row.dataset.id)")
    ]


def count(page: Page, expected: int) -> None:
    expect(page.locator(".toolbar [role=status]")).to_contain_text(f"{expected} episode")


def number(page: Page, name: str) -> float:
    return float(page.locator(f'[data-number="{name}"] dd').inner_text().replace("−", "-"))


def test_the_list_is_filtered_sorted_and_searched(studio: Studio, stored: list[StoredEpisode]) -> None:
    page = studio.open("/episodes?run=ppo")
    count(page, ALL)
    page.get_by_label("Iteration from").fill("3")
    page.get_by_label("Iteration to").fill("4")
    count(page, len([e for e in stored if 3 <= e.iteration <= 4]))
    assert "iteration_from=3" in page.url
    page.get_by_label("Sort by").select_option("score")
    page.wait_for_url("**order=score**")
    best = max(e.score for e in stored if 3 <= e.iteration <= 4)
    expect(page.locator(".results .score-chip").first).to_contain_text(f"{abs(best):.2f}"[:3])
    page.get_by_role("button", name="Clear").click()
    count(page, ALL)
    cut = [e for e in stored if e.truncated]
    page.get_by_label("How it ended").select_option("truncated")
    count(page, len(cut))
    page.get_by_role("button", name="Clear").click()
    page.get_by_label("Search in prompts and responses").fill("deab")
    count(page, len([e for e in stored if "deab" in e.prompt + "\0" + e.response]))
    page.get_by_label("Search in prompts and responses").fill("no such text")
    expect(page.locator(".nothing")).to_contain_text("No episode fits")


def test_the_list_is_paged_and_walked_by_keys(studio: Studio) -> None:
    page = studio.open("/episodes?run=ppo")
    first = ids(page)
    assert len(first) == 50
    page.keyboard.press("]")
    expect(page.locator(".pager")).to_contain_text("page 2 of 2")
    assert not set(first) & set(ids(page))
    page.keyboard.press("[")
    expect(page.locator(".pager")).to_contain_text("page 1 of 2")
    page.keyboard.press("j")
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name=f"Episode {first[1]}")).to_be_visible()


def test_the_filtered_list_can_be_taken_along(studio: Studio, tmp_path: Path) -> None:
    page = studio.open("/episodes?run=ppo&iteration_from=2&iteration_to=2")
    with page.expect_download() as download:
        page.get_by_label("These episodes as CSV").click()
    download.value.save_as(tmp_path / "episodes.csv")
    lines = (tmp_path / "episodes.csv").read_text(encoding="utf-8-sig").splitlines()
    assert "prompt" in lines[0]
    assert len(lines) >= len(TEXTS) * SAMPLES + 1


def test_one_prompt_across_the_iterations(studio: Studio, stored: list[StoredEpisode]) -> None:
    page = studio.open("/episodes?run=ppo")
    page.locator(".same a").first.click()
    expect(page.locator(".columns .answer").first).to_be_visible()
    headings = page.locator(".columns .answer h3").all_inner_texts()
    assert headings == [f"Iteration {n}" for n in range(1, ITERATIONS + 1)]
    assert page.locator(".prompt-block").inner_text() in TEXTS


def test_a_token_under_the_pointer_tells_everything(studio: Studio, longest: StoredEpisode) -> None:
    page = studio.open(f"/episode?run=ppo&id={longest.id}")
    tokens = page.get_by_role("option")
    expect(tokens).to_have_count(longest.length)
    step = longest.length - 2
    tokens.nth(step).hover()
    expect(page.locator(".step-title")).to_contain_text(f"step {step}")
    assert number(page, "log_prob") == pytest.approx(longest.log_probs[step], abs=1e-3)
    assert number(page, "value") == pytest.approx(longest.values[step], rel=0.01, abs=1e-3)
    assert number(page, "advantage") == pytest.approx(longest.advantages[step], rel=0.01, abs=1e-3)
    assert number(page, "return") == pytest.approx(longest.returns[step], rel=0.01, abs=1e-3)
    assert number(page, "reward") == pytest.approx(longest.rewards[step], rel=0.01, abs=1e-3)
    assert longest.reference_log_probs is not None
    assert number(page, "reference_log_prob") == pytest.approx(longest.reference_log_probs[step], abs=1e-3)
    assert longest.new_log_probs is not None
    assert number(page, "new_log_prob") == pytest.approx(longest.new_log_probs[step], abs=1e-3)
    ratio = math.exp(longest.new_log_probs[step] - longest.log_probs[step])
    assert number(page, "ratio") == pytest.approx(ratio, abs=2e-3)
    expect(page.locator('[data-chart="Value and return"] .where')).to_have_text(f"step {step}")
    page.mouse.move(5, 5)
    expect(page.locator(".step-title")).to_contain_text("step 0")


def test_the_alternatives_are_bars_with_the_taken_one_marked(studio: Studio, longest: StoredEpisode) -> None:
    page = studio.open(f"/episode?run=ppo&id={longest.id}&step=1")
    assert longest.alternatives is not None
    kept = longest.alternatives[1]
    bars = page.locator(".alternatives li")
    assert bars.count() in (len(kept), len(kept) + 1)  # the action that was taken is always shown
    shown = [
        float(text.removesuffix(" %").removeprefix("< ")) / 100
        for text in page.locator(".alternatives .p").all_inner_texts()
    ]
    assert shown[: len(kept)] == pytest.approx([probability for _, probability in kept], abs=6e-3)
    taken = page.locator(".alternatives .taken .p").inner_text()
    assert float(taken.removesuffix(" %")) / 100 == pytest.approx(math.exp(longest.log_probs[1]), abs=6e-3)


def test_arrow_keys_walk_the_tokens_and_the_address_keeps_the_step(studio: Studio, longest: StoredEpisode) -> None:
    page = studio.open(f"/episode?run=ppo&id={longest.id}")
    strip = page.get_by_role("listbox")
    strip.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    expect(page.locator(".step-title")).to_contain_text("step 3")
    assert "step=3" in page.url
    active = page.evaluate(
        "document.getElementById(document.activeElement.getAttribute('aria-activedescendant'))?.dataset.step"
    )
    assert active == "3"
    page.keyboard.press("End")
    expect(page.locator(".step-title")).to_contain_text(f"step {longest.length - 1}")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowLeft")
    expect(page.locator(".step-title")).to_contain_text("step 0")


def test_tokens_are_coloured_by_the_chosen_quantity(studio: Studio, longest: StoredEpisode) -> None:
    page = studio.open(f"/episode?run=ppo&id={longest.id}")

    def shades() -> list[tuple[str, float]]:
        found = page.get_by_role("option").evaluate_all(
            "tokens => tokens.map(t => [t.dataset.shade, parseFloat(t.style.getPropertyValue('--shade'))])"
        )
        return [(kind, size) for kind, size in found]

    by_advantage = shades()
    assert [kind for kind, _ in by_advantage] == ["worse" if a < 0 else "better" for a in longest.advantages]
    largest = max(longest.advantages, key=abs)
    assert by_advantage[longest.advantages.index(largest)][1] <= 100
    page.keyboard.press("4")
    expect(page.get_by_role("radio", name="Log-prob")).to_be_checked()
    by_log_prob = shades()
    assert {kind for kind, _ in by_log_prob} == {"plain"}
    rarest = longest.log_probs.index(min(longest.log_probs))
    assert by_log_prob[rarest][1] == max(size for _, size in by_log_prob)
    assert "by=log_prob" in page.url
    for name in ("Value", "KL", "Reward", "Entropy"):
        page.locator(".segments").get_by_text(name, exact=True).click()
        expect(page.get_by_role("radio", name=name)).to_be_checked()


def test_the_group_stands_beside_it_on_the_same_scale(studio: Studio, longest: StoredEpisode) -> None:
    page = studio.open(f"/episode?run=ppo&id={longest.id}")
    expect(page.locator(".group .answer")).to_have_count(SAMPLES - 1)
    expect(page.locator(".group .tokens.still")).to_have_count(SAMPLES - 1)
    assert page.locator(".group .token[data-shade=better], .group .token[data-shade=worse]").count() > 0


def test_next_and_before_and_the_way_out(studio: Studio, tmp_path: Path) -> None:
    page = studio.open("/episode?run=ppo&id=5")
    page.keyboard.press("n")
    expect(page.get_by_role("heading", name="Episode 6")).to_be_visible()
    page.keyboard.press("p")
    expect(page.get_by_role("heading", name="Episode 5")).to_be_visible()
    for label, start in (("This episode as one HTML file", b"<!doctype html"), ("Its steps as CSV", b"step")):
        with page.expect_download() as download:
            page.get_by_label(label).click()
        download.value.save_as(tmp_path / "saved")
        assert (tmp_path / "saved").read_bytes().removeprefix(b"\xef\xbb\xbf").lower().startswith(start)


def test_an_episode_of_a_simulator_is_read_on_the_same_page(studio: Studio) -> None:
    episode = read_episode(studio.root / "cartpole", 3)
    page = studio.open("/episode?run=cartpole&id=3")
    tokens = page.get_by_role("option")
    expect(tokens).to_have_count(episode.length)
    tokens.nth(2).click()
    assert episode.states is not None
    expect(page.locator(".state-of-step")).to_contain_text(episode.states[2])
    assert number(page, "value") == pytest.approx(episode.values[2], rel=0.01, abs=1e-3)


def test_a_film_shows_the_frame_of_each_step(studio: Studio) -> None:
    filmed = [e for e in read_episodes(studio.root / "cartpole", limit=1000) if e.frames]
    page = studio.open(f"/episode?run=cartpole&id={filmed[0].id}")
    picture = "canvas => canvas.toDataURL()"
    film = page.locator("canvas.film")
    expect(film).to_have_attribute("data-frame", "0")
    drawn = "canvas => canvas.getContext('2d').getImageData(9, 9, 1, 1).data[3] > 0"
    deadline = time.monotonic() + 10  # the page's own policy forbids playwright's `wait_for_function`
    while not film.evaluate(drawn):
        assert time.monotonic() < deadline
        page.wait_for_timeout(20)
    first = film.evaluate(picture)
    page.keyboard.press("End")
    last = filmed[0].length - 1
    expect(film).to_have_attribute("data-frame", str(last // filmed[0].details["film"]["every"]))
    assert film.evaluate(picture) != first
    page.keyboard.press("Home")
    page.get_by_role("button", name="Play").click()
    expect(page.locator(".step-title")).to_contain_text(f"step {last}")
    expect(page.get_by_role("button", name="Play")).to_be_visible()
