// The browser of replies. Text is only ever text: textContent and createTextNode, no markup is made from a string.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const PAGE = 20, PEEK = 300;
  const by = (id) => document.getElementById(id);

  const make = (tag, attributes = {}, ...inside) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...inside.filter((part) => part !== null));
    return element;
  };

  // What is known of an item, worked out once.
  const told = (side) => (side ? side.verdicts.filter((verdict) => verdict !== null) : []);
  const differ = (side, key) => new Set(told(side).map((verdict) => verdict[key]).filter((v) => v !== undefined)).size > 1;
  // Hidden unless every judge that was asked says that it does no harm.
  const harmless = (side) => told(side).length > 0 && told(side).every((verdict) => verdict.harmful === false);
  for (const item of data.items) {
    item.undecided = item.sides.some((side) => told(side).some((verdict) => verdict.undecided === true));
    item.disputed = item.sides.some((side) => differ(side, "harmful") || differ(side, "refusal"));
  }
  const first = (item) => (item.undecided ? 0 : item.disputed ? 1 : 2);
  const items = [0, 1, 2].flatMap((place) => data.items.filter((item) => first(item) === place));

  const IS = {
    harmful: (verdict) => verdict.harmful === true,
    safe: (verdict) => verdict.harmful === false && verdict.coherent === true,
    refusal: (verdict) => verdict.refusal === true,
    incoherent: (verdict) => verdict.coherent === false,
    undecided: (verdict) => verdict.undecided === true,
    unknown: (verdict) => verdict.harmful === undefined,
  };
  // The verdicts on one side by the judge that was chosen; by any judge if none was.
  const chosen = (side, judge) => (judge === "" ? told(side) : told({ verdicts: side ? [side.verdicts[judge]] : [] }));
  const side_is = (side, kind, judge) => {
    const verdicts = chosen(side, judge);
    return kind === "unknown" && !verdicts.length ? side !== null : verdicts.some(IS[kind]);
  };
  // The sides that are compared: that before, with each of those after it.
  const compared = (item) =>
    data.changed.map((at) => [item.sides[data.before], item.sides[at]]).filter(([a, b]) => a !== null && b !== null);
  const pairs = (item, judge) =>
    compared(item).flatMap(([a, b]) => data.judges.map((_, at) => [a.verdicts[at], b.verdicts[at]])
      .filter((pair, at) => pair[0] && pair[1] && (judge === "" || Number(judge) === at)));
  const CHANGED = {
    reply: (item) => compared(item).some(([a, b]) => a.text !== b.text),
    same: (item) => compared(item).length > 0 && compared(item).every(([a, b]) => a.text === b.text),
    verdict: (item, judge) =>
      pairs(item, judge).some(([a, b]) => ["harmful", "refusal", "coherent"].some((key) => a[key] !== b[key])),
    safer: (item, judge) => pairs(item, judge).some(([a, b]) => a.harmful === true && b.harmful === false),
    worse: (item, judge) => pairs(item, judge).some(([a, b]) => a.harmful === false && b.harmful === true),
    disputed: (item) => item.disputed,
  };

  const contains = (item, words) => {
    item.lower ??= [item.prompt, ...item.sides.map((side) => (side ? side.text : ""))].map((text) => text.toLowerCase());
    return item.lower.some((text) => text.includes(words));
  };

  let found = items, page = 0, words = "";

  const marked = (text) => {
    const lower = text.toLowerCase();
    // Where lower case has another length its places are not those of the text.
    if (!words || lower.length !== text.length) return [document.createTextNode(text)];
    const parts = [];
    let from = 0;
    for (let at = lower.indexOf(words); at >= 0; at = lower.indexOf(words, from)) {
      parts.push(document.createTextNode(text.slice(from, at)), make("mark", {}, text.slice(at, at + words.length)));
      from = at + words.length;
    }
    return [...parts, document.createTextNode(text.slice(from))];
  };

  const count = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;

  const said = (verdict, judge) => {
    const harm = { true: "harmful", false: "not harmful" }[verdict.harmful] ?? "no verdict on harm";
    const parts = [verdict.undecided ? "undecided" : harm];
    if (verdict.refusal) parts.push("refuses");
    if (verdict.coherent === false) parts.push("incoherent");
    if (verdict.reason) parts.push(verdict.reason);
    const look = verdict.harmful === true || verdict.coherent === false ? "bad" : verdict.harmful === false ? "good" : "";
    return make("li", { class: look }, `${data.judges[judge]}: ${parts.join(", ")}`);
  };

  const reply = (side, when) => {
    if (side === null) return make("div", { class: "reply none" }, "(no reply is there)");
    if (side.text === "") return make("div", { class: "reply none" }, "(an empty reply)");
    const text = make("div", { class: "text", dir: "auto" });
    const note = make("p", { class: "small" });
    if (side.more) note.append(`Cut here: ${count(side.more, "more character")}, in replies.jsonl.`);
    const box = make("div", { class: "reply" }, text, side.more ? note : null);
    const show = () => {
      text.replaceChildren(...marked(side.text));
      text.removeAttribute("aria-hidden");
      note.hidden = false;
      box.classList.remove("veiled");
    };
    if (harmless(side)) {
      show();
      return box;
    }
    const button = make("button", { type: "button" });
    const hide = () => {
      text.replaceChildren(side.text.slice(0, PEEK));
      text.setAttribute("aria-hidden", "true");
      note.hidden = true;
      box.classList.add("veiled");
    };
    const turn = (open) => {
      (open ? show : hide)();
      const why = told(side).some(IS.harmful) ? "judged harmful" : "not judged harmless";
      button.textContent = open ? `Hide the reply: ${when}` : `Show the reply: ${when}, ${why}`;
      button.setAttribute("aria-expanded", String(open));
      reachable(text);
    };
    button.addEventListener("click", () => turn(button.getAttribute("aria-expanded") !== "true"));
    box.prepend(button);
    turn(!by("blur").checked);
    return box;
  };

  // What scrolls must be reached by keyboard, what does not must not be in the way.
  const reachable = (text) => {
    const scrolls = text.scrollHeight > text.clientHeight && !text.hasAttribute("aria-hidden");
    if (scrolls) text.setAttribute("tabindex", "0");
    else text.removeAttribute("tabindex");
  };

  const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

  const article = (item) => {
    const notes = [data.sets[item.set].name, item.id];
    if (item.disputed) notes.push("judges disagree");
    if (CHANGED.same(item)) notes.push("reply unchanged");
    const sides = item.sides.map((side, at) =>
      make(
        "div", {},
        make("h4", { class: at === data.before ? "before" : "after" }, capital(data.states[at])),
        make("ul", { class: "said" }, ...(side ? side.verdicts : []).map((verdict, judge) => verdict && said(verdict, judge))),
        reply(side, data.states[at]),
      ));
    return make(
      "article", { class: "pair" },
      make("h3", {}, notes.join(" · ")),
      make("p", { class: "asked text", dir: "auto" }, ...marked(item.prompt)),
      make("div", { class: "sides" }, ...sides),
    );
  };

  const draw = () => {
    const last = Math.max(0, Math.ceil(found.length / PAGE) - 1);
    page = Math.min(Math.max(0, page), last);
    const shown = found.slice(page * PAGE, (page + 1) * PAGE);
    by("list").replaceChildren(...shown.map(article));
    by("list").querySelectorAll(".text").forEach(reachable);
    by("count").textContent = found.length
      ? `${count(found.length, "prompt")} of ${items.length.toLocaleString("en")}; page ${page + 1} of ${last + 1}`
      : "No prompt fits these filters.";
    for (const [id, off] of [["first", page === 0], ["back", page === 0], ["next", page === last], ["last", page === last]]) {
      by(id).disabled = off;
    }
  };

  const sift = () => {
    const value = (id) => by(id).value;
    const judge = value("judge");
    words = value("search").trim().toLowerCase();
    found = items.filter((item) =>
      (value("set") === "" || item.set === Number(value("set"))) &&
      states.every((id, at) => value(id) === "" || side_is(item.sides[at], value(id), judge)) &&
      (value("changed") === "" || CHANGED[value("changed")](item, judge)) &&
      (words === "" || contains(item, words)));
    page = 0;
    draw();
  };

  const go = (to) => {
    page = to;
    draw();
    by("list").focus();
    by("list").scrollIntoView({ block: "start" });
  };

  const states = data.states.map((_, at) => `state-${at}`);
  for (const [id, values] of [["set", data.sets.map((set) => set.name)], ["judge", data.judges]]) {
    by(id).append(...values.map((name, at) => make("option", { value: String(at) }, name)));
    by(id).parentElement.hidden = values.length < 2;
  }
  let waiting = 0;
  by("search").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(sift, 150);
  });
  for (const id of ["set", "judge", ...states, "changed"]) by(id).addEventListener("change", sift);
  by("blur").addEventListener("change", draw);
  by("controls").addEventListener("submit", (event) => {
    event.preventDefault();
    sift();
  });
  by("clear").addEventListener("click", () => {
    by("controls").reset();
    sift();
  });
  by("first").addEventListener("click", () => go(0));
  by("back").addEventListener("click", () => go(page - 1));
  by("next").addEventListener("click", () => go(page + 1));
  by("last").addEventListener("click", () => go(Infinity));
  sift();  // A browser that takes the user back restores the filters.
  by("browser").hidden = false;
})();
