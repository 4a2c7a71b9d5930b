"""Curves: few columns for a million points, no peak lost, nothing kept after the end. All of it in the browser, on the app's own modules."""

POINTS = """async (count) => {
  const { chart } = await import("/js/chart.js");
  const place = document.createElement("div");
  document.getElementById("main").prepend(place);
  const [x, y] = [new Float64Array(count), new Float64Array(count)];
  for (let index = 0; index < count; index += 1) [x[index], y[index]] = [index, 2 + Math.sin(index / 5000)];
  y[777777 % count] = 1000;
  const drawn = chart(place, { series: [{ label: "loss", x: [], y: [] }], name: "A long run" });
  while (!place.querySelector("canvas")) await new Promise((next) => setTimeout(next, 10));
  drawn.update({ series: [{ label: "loss", x, y }] });
  await new Promise(requestAnimationFrame);
  const { columnsOf } = await import("/js/envelope.js");
  const { data } = columnsOf([{ x, y }], null, 1000, false);
  drawn.destroy();
  const left = place.childElementCount;
  place.remove();
  return { largest: Math.max(...data[3]), columns: data[0].length, left };
}"""


def test_a_million_points_are_drawn_as_a_thousand_columns_and_the_one_peak_among_them_is_seen(visit, shared_app):
    page = visit(shared_app)
    assert page.evaluate(POINTS, 1_000_000) == {"largest": 1000, "columns": 1000, "left": 0}


def test_short_curves_keep_every_point_and_what_is_not_finite_is_left_out(visit, shared_app):
    page = visit(shared_app)
    found = page.evaluate(
        """async () => (await import("/js/envelope.js")).columnsOf(
            [{ x: [1, 2, 3], y: [5, NaN, null] }, { x: [2, 4], y: [0, 7], min: [0, 6], max: [1, 8] }], null, 500, true)"""
    )
    assert found["data"] == [[1, 2, 3, 4], [5, None, None, None], [5, None, None, None], [5, None, None, None],
                             [None, None, None, 7], [None, None, None, 6], [None, 1, None, 8]]  # fmt: skip
    assert found["range"] == {"min": 1, "max": 4}


PRESSED = """async () => {
  const { chart } = await import("/js/chart.js");
  const { replace } = await import("/js/dom.js");
  const place = document.createElement("div");
  document.getElementById("main").prepend(place);
  window.drawn = chart(place, { series: ["two", "one"].map((label) => ({ label, x: [1, 2], y: [3, 4] })), name: "Pressed" });
  window.again = () => {
    drawn.update({ log: true, series: ["two", "three"].map((label) => ({ label, x: [1, 2, 3], y: [3, 4, 5] })) });
    replace(place, [...place.children], "and words");
  };
}"""


def test_a_press_is_not_lost_where_new_data_arrive_before_the_mouse_is_released(visit, shared_app):
    page = visit(shared_app)
    page.evaluate(PRESSED)
    mark = page.get_by_role("button", name="two")
    mark.hover()
    page.mouse.down()
    page.evaluate("again()")
    page.mouse.up()
    assert mark.get_attribute("aria-pressed") == "false" and mark.evaluate("each => each === document.activeElement")
    marks = page.locator(".legend button[title]").all_inner_texts()
    assert [each.split()[0] for each in marks] == ["two", "three"]
    assert page.evaluate("document.getElementById('main').firstChild.lastChild.data") == "and words"
