"use strict";
const find = (id) => document.getElementById(id);
const history = [];

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function nameOf(item) {
  return item.title || item.id;
}

function say(text, problem) {
  find("status").textContent = text;
  find("status").className = problem ? "problem" : "";
}

function showHistory() {
  find("history").replaceChildren(...history.map((item, place) => {
    const line = element("li", nameOf(item));
    const remove = element("button", "Remove");
    remove.type = "button";
    remove.setAttribute("aria-label", `Remove ${nameOf(item)}`);
    remove.addEventListener("click", () => {
      history.splice(place, 1);
      showHistory();
      find("search").focus();
    });
    line.append(remove);
    return line;
  }));
  find("ask").disabled = find("clear").disabled = history.length === 0;
}

async function showFound() {
  const words = find("search").value.trim();
  if (!words) {
    find("found").replaceChildren();
    return;
  }
  const answer = await fetch("items?" + new URLSearchParams({ query: words }));
  const items = answer.ok ? await answer.json() : [];
  if (words !== find("search").value.trim()) return; // another search was begun meanwhile
  if (items.length === 0) {
    find("found").replaceChildren(element("li", "No item has these words."));
    return;
  }
  find("found").replaceChildren(...items.map((item) => {
    const line = element("li", nameOf(item));
    const add = element("button", "Add");
    add.type = "button";
    add.setAttribute("aria-label", `Add ${nameOf(item)} to the history`);
    add.addEventListener("click", () => {
      history.push(item);
      showHistory();
    });
    line.append(add);
    return line;
  }));
}

async function recommend(question) {
  say("Asking…");
  const begin = performance.now();
  let answer, found;
  try {
    answer = await fetch("recommend", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ ...question, k: 10, explain: true }),
    });
    found = await answer.json();
  } catch (error) {
    say("The server does not answer.", true);
    return;
  }
  const milliseconds = (performance.now() - begin).toFixed(1);
  find("table").hidden = !answer.ok;
  if (!answer.ok) {
    say(typeof found.detail === "string" ? found.detail : "The question was refused.", true);
    return;
  }
  find("table").tBodies[0].replaceChildren(...found.items.map((item, place) => {
    const row = element("tr");
    const why = (item.why || []).map(nameOf).join("; ");
    row.append(
      element("td", String(place + 1), "number"),
      element("td", nameOf(item)),
      element("td", item.score.toFixed(3), "number"),
      element("td", why || "–"),
    );
    return row;
  }));
  say(`${found.items.length} items, in ${milliseconds} ms, by model ${found.model}.`);
  find("result").focus();
}

async function begin() {
  let known;
  try {
    known = await (await fetch("health")).json();
  } catch (error) {
    find("about").textContent = "The server does not answer.";
    return;
  }
  const leaky = known.leaky ? " LEAKY: its figures are not honest." : "";
  find("about").textContent = `Model ${known.model}, ${known.num_items} items, ${known.users} users.${leaky}`;
  find("by-user").hidden = known.users === 0;
  find("by-search").hidden = !known.reads.includes("history");
}

let timer;
find("search").addEventListener("input", () => {
  clearTimeout(timer);
  timer = setTimeout(showFound, 150);
});
find("by-search").addEventListener("submit", (event) => {
  event.preventDefault();
  showFound();
});
find("by-user").addEventListener("submit", (event) => {
  event.preventDefault();
  recommend({ user: find("user").value.trim() });
});
find("ask").addEventListener("click", () => recommend({ history: history.map((item) => item.id) }));
find("clear").addEventListener("click", () => {
  history.length = 0;
  showHistory();
  find("search").focus();
});
begin();
