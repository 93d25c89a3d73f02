// The dashboard: reads the JSON API once, then follows /api/live.

import { Chart } from "./chart.js";
import { ago, bytes, duration, element, number, percent, seconds, whole } from "./format.js";

const ROWS = 50;
const REFRESH_MS = 2000;
const find = (id) => document.getElementById(id);

const shown = { federation: null, rounds: new Map(), state: null, contains: "", offset: 0, order: "last_seen_at", direction: "down" };
let federations = [];
let charts = {};
let refreshing = null;
let refreshedAt = 0;

// --- reading ------------------------------------------------------------------------------------

async function read(path, query = {}) {
  const given = Object.entries(query).filter(([, value]) => value !== null && value !== "");
  // The origin by itself: where the page's address has a password in it, fetch refuses a relative one.
  const response = await fetch(`${location.origin}/api/${path}?${new URLSearchParams(given)}`);
  const answer = await response.json().catch(() => ({ error: `HTTP ${response.status}` }));
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

async function readRounds(limit) {
  const federation = shown.federation;
  const { rounds } = await read("rounds", { federation, limit });
  if (federation !== shown.federation) return;
  for (const one of rounds) shown.rounds.set(`${one.round}/${one.attempt}`, one);
  showCharts();
}

async function readDevices() {
  const { federation, state, contains, offset, order, direction } = shown;
  const page = await read("devices", { federation, state, contains, offset, order, direction, limit: ROWS });
  if (federation === shown.federation && offset === shown.offset) showDevices(page);
}

// Of many changes in a row only the first and the last are read.
function refresh() {
  if (refreshing) return;
  const wait = Math.max(0, refreshedAt + REFRESH_MS - Date.now());
  refreshing = setTimeout(async () => {
    refreshedAt = Date.now();
    refreshing = null;
    await told(Promise.all([readRounds(20), readDevices()]));
  }, wait);
}

async function told(promise) {
  try {
    await promise;
    find("notice").hidden = true;
  } catch (error) {
    find("notice").textContent = `Cannot read the coordinator: ${error.message}`;
    find("notice").hidden = false;
  }
}

// --- federation and round -----------------------------------------------------------------------

const current = () => federations.find((one) => one.name === shown.federation);

function take(found) {
  federations = found;
  if (!current()) choose(wantedFederation());
  else showFederation();
}

function wantedFederation() {
  const wanted = location.hash.slice(1);
  return (federations.find((one) => encodeURIComponent(one.name) === wanted) ?? federations[0])?.name ?? null;
}

function choose(name) {
  Object.assign(shown, { federation: name, rounds: new Map(), state: null, contains: "", offset: 0 });
  find("contains").value = "";
  find("main").hidden = name === null;
  if (name === null) {
    find("notice").textContent = "The store holds no federation yet.";
    find("notice").hidden = false;
    return Promise.resolve();
  }
  showFederation();
  return told(Promise.all([readRounds(1000), readDevices()]));
}

function showFederation() {
  const one = current();
  document.title = `${one.name} · pf2lora`;
  find("federations").replaceChildren(
    ...federations.map((f) =>
      element("a", { href: `#${encodeURIComponent(f.name)}`, "aria-current": f === one ? "page" : null }, f.name),
    ),
  );
  find("name").textContent = one.name;
  find("what").textContent = `${one.algorithm} on ${one.backbone.split("/").slice(-2).join("/")}`;
  showRound(one);
  showTiles(one);
  showStates(one);
}

function fill(id, share) {
  find(id).querySelector(".fill").style.width = `${100 * Math.min(1, share)}%`;
  find(id).setAttribute("aria-valuenow", Math.round(100 * share));
}

function showRound(one) {
  const open = one.open_round;
  const over = !open && one.rounds_done >= one.rounds;
  const attempt = open && open.attempt > 1 ? `, attempt ${open.attempt}` : "";
  find("round-title").textContent = open
    ? `Round ${open.round}${attempt}`
    : { pause: "Paused", stop: "Stopped" }[one.wish] ?? (over ? "All rounds are done" : "Waiting for devices");
  find("round-bar").hidden = find("round-text").hidden = !open;
  if (open) {
    // A buffer, which has no deadline, takes reports of devices that were asked before it.
    const wanted = open.deadline_at === null ? open.goal : open.cohort;
    fill("round-bar", open.reports / wanted);
    const goal = find("round-bar").querySelector(".goal");
    goal.hidden = open.goal >= wanted;
    goal.style.left = `${(100 * open.goal) / wanted}%`;
    const early = open.goal < wanted ? `; ${whole(open.goal)} end the round` : "";
    find("round-text").textContent = `${whole(open.reports)} of ${whole(wanted)} reports${early}`;
  }
  fill("all-bar", one.rounds_done / one.rounds);
  find("all-text").textContent = `${whole(one.rounds_done)} of ${whole(one.rounds)} rounds done`;
  showTime();
}

function showTime() {
  const deadline = current()?.open_round?.deadline_at;
  const left = deadline ? deadline - Date.now() / 1000 : null;
  find("round-time").textContent = left === null ? "" : left > 0 ? `${duration(Math.ceil(left)).replace(".0", "")} left` : "deadline passed";
  for (const cell of document.querySelectorAll("[data-at]")) cell.textContent = ago(Number(cell.dataset.at));
}

function showTiles(one) {
  const count = (...states) => states.reduce((sum, state) => sum + (one.devices[state] ?? 0), 0);
  const all = Object.values(one.devices).reduce((a, b) => a + b, 0);
  const tiles = [
    ["Connected", whole(count("waiting", "training", "sending")), `of ${whole(all)}`],
    ["Training", whole(count("training")), ""],
    ["Reports kept", whole(one.kept), `${whole(one.late)} late`],
    ["Reports rejected", whole(one.rejected), ""],
    ["Sent by devices", bytes(one.sent_bytes), ""],
    ["Received by devices", bytes(one.received_bytes), ""],
  ];
  find("tiles").replaceChildren(
    ...tiles.map(([label, value, more]) =>
      element("div", {}, element("dt", {}, label), element("dd", {}, `${value} `, element("small", {}, more))),
    ),
  );
}

// --- curves -------------------------------------------------------------------------------------

function makeCharts() {
  const make = (id, options) => new Chart(find(`chart-${id}`), options);
  const accuracy = "No device has told its accuracy yet. Each chooses whether to: pf2lora-client run --tell-accuracy";
  charts = {
    accuracy: make("accuracy", { title: "Held-out accuracy", format: percent, tick: (share) => `${number(100 * share)} %`, empty: accuracy }),
    loss: make("loss", { title: "Training loss", format: number, empty: "No round has been aggregated yet." }),
    reports: make("reports", { title: "Reports", format: number, zero: true, counts: true, empty: "No round has been aggregated yet." }),
    time: make("time", { title: "Time of a round", format: seconds, zero: true, empty: "No round has been aggregated yet." }),
  };
}

function showCharts() {
  const rounds = [...shown.rounds.values()].sort((a, b) => a.round - b.round || a.attempt - b.attempt);
  const failed = rounds.filter((one) => one.outcome !== "aggregated").map((one) => one.round);
  // Of several attempts the last one stands for the round.
  const last = [...new Map(rounds.filter((one) => one.outcome === "aggregated").map((one) => [one.round, one])).values()];
  const metric = (name) =>
    last
      .filter((one) => one.metrics[name])
      .map((one) => ({ x: one.round, y: one.metrics[name].median, low: one.metrics[name].low, high: one.metrics[name].high }));
  charts.accuracy.show([
    { label: "common", kind: "one", points: metric("accuracy_common") },
    { label: "common + personal", kind: "two", points: metric("accuracy_personal") },
  ]);
  charts.loss.show([{ label: "median", kind: "one", points: metric("loss") }]);
  charts.reports.show(
    [
      { label: "asked", kind: "three", points: last.map((one) => ({ x: one.round, y: one.cohort })) },
      { label: "kept", kind: "one", points: last.map((one) => ({ x: one.round, y: one.reports })) },
    ],
    failed,
  );
  charts.time.show([{ label: "took", kind: "one", points: last.map((one) => ({ x: one.round, y: one.closed_at - one.opened_at })) }], failed);
}

// --- devices ------------------------------------------------------------------------------------

const COLUMNS = [
  ["Device", "device", (d) => element("span", { title: d.device }, d.device)],
  ["State", "state", state],
  ["Last seen", "last_seen_at", (d) => element("span", { "data-at": d.last_seen_at }, ago(d.last_seen_at))],
  ["Round", "round", (d) => d.round ?? "–"],
  ["Kept", "kept", (d) => whole(d.kept)],
  ["Late", "late", (d) => whole(d.late)],
  ["Rejected", "rejected", (d) => whole(d.rejected)],
  ["Rows", "examples", (d) => (d.examples === null ? "–" : whole(d.examples))],
  ["Rank", "rank_max", rank],
  ["Common", "accuracy_common", (d) => (d.accuracy_common === null ? "–" : percent(d.accuracy_common))],
  ["Personal", "accuracy_personal", personal],
  ["Sent", "sent_bytes", (d) => bytes(d.sent_bytes)],
  ["Received", "received_bytes", (d) => bytes(d.received_bytes)],
];

function state(device) {
  const barred = ["revoked", "quarantined"].includes(device.standing);
  return element("span", { class: `state ${barred ? "refused" : device.state}` }, barred ? device.standing : device.state);
}

function rank(device) {
  if (device.rank_max === null) return "–";
  const [low, high] = [device.rank_min ?? device.rank_max, device.rank_max].map(number);
  return low === high ? high : `${low}–${high}`;
}

function personal(device) {
  if (device.accuracy_personal === null) return "–";
  const said = percent(device.accuracy_personal);
  if (device.accuracy_common === null) return said;
  const gain = 100 * (device.accuracy_personal - device.accuracy_common);
  const [kind, sign] = gain >= 0.05 ? ["up", "+"] : gain <= -0.05 ? ["down", "−"] : ["", "±"];
  const text = ` ${sign}${Math.abs(gain).toFixed(1)}`;
  return element("span", {}, said, element("span", { class: kind }, text));
}

function showColumns() {
  find("columns").replaceChildren(
    ...COLUMNS.map(([label, order]) => {
      const sorted = shown.order === order ? (shown.direction === "down" ? "descending" : "ascending") : null;
      const button = element("button", { type: "button" }, label);
      button.addEventListener("click", () => {
        const first = ["device", "state"].includes(order) ? "up" : "down";
        shown.direction = sorted ? (shown.direction === "down" ? "up" : "down") : first;
        Object.assign(shown, { order, offset: 0 });
        showColumns();
        find("columns").querySelector("[aria-sort] button").focus();
        told(readDevices());
      });
      return element("th", { scope: "col", "aria-sort": sorted }, button);
    }),
  );
}

function showDevices(page) {
  find("devices-total").textContent = whole(page.total);
  find("nobody").hidden = page.devices.length > 0;
  find("rows").replaceChildren(
    ...page.devices.map((device) =>
      element("tr", {}, ...COLUMNS.map(([label, , cell]) => element("td", { "data-label": label }, cell(device)))),
    ),
  );
  const first = shown.offset + 1;
  find("page").textContent = page.total ? `${whole(first)} to ${whole(shown.offset + page.devices.length)}` : "";
  find("earlier").disabled = shown.offset === 0;
  find("later").disabled = shown.offset + ROWS >= page.total;
}

function showStates(one) {
  const states = Object.entries(one.devices).sort(([a], [b]) => a.localeCompare(b));
  const key = JSON.stringify([states, shown.state]);
  if (find("states").dataset.key === key) return; // a button that is in use stays the same
  find("states").dataset.key = key;
  find("states").replaceChildren(
    ...states.map(([state, count]) => {
      const chip = element("button", { type: "button", "aria-pressed": String(shown.state === state) }, `${state} ${whole(count)}`);
      chip.addEventListener("click", () => {
        Object.assign(shown, { state: shown.state === state ? null : state, offset: 0 });
        showStates(current());
        told(readDevices());
      });
      return chip;
    }),
  );
}

function turn(pages) {
  shown.offset = Math.max(0, shown.offset + pages * ROWS);
  told(readDevices());
}

// --- beginning ----------------------------------------------------------------------------------

function follow() {
  const link = find("link");
  const source = new EventSource("/api/live");
  source.onopen = () => {
    link.textContent = "live";
    link.className = "link live";
  };
  source.onerror = () => {
    if (link.textContent !== "reconnecting") {
      find("notice").textContent = `There is no live link to the coordinator: all is as it was at ${new Date().toLocaleTimeString()}.`;
      find("notice").hidden = false;
    }
    link.textContent = "reconnecting";
    link.className = "link lost";
    // A browser gives up after an HTTP error, such as a proxy's while the coordinator restarts.
    if (source.readyState === EventSource.CLOSED) setTimeout(follow, REFRESH_MS);
  };
  source.onmessage = (event) => {
    take(JSON.parse(event.data));
    refresh();
  };
}

async function begin() {
  makeCharts();
  showColumns();
  find("earlier").addEventListener("click", () => turn(-1));
  find("later").addEventListener("click", () => turn(1));
  let typing;
  find("contains").addEventListener("input", (event) => {
    clearTimeout(typing);
    typing = setTimeout(() => {
      Object.assign(shown, { contains: event.target.value, offset: 0 });
      told(readDevices());
    }, 150);
  });
  window.addEventListener("hashchange", () => choose(wantedFederation()));
  setInterval(showTime, 1000);
  await told(
    read("federations").then((answer) => {
      federations = answer.federations;
      return choose(wantedFederation());
    }),
  );
  refreshedAt = Date.now();
  requestAnimationFrame(() => performance.mark("shown"));
  follow();
}

begin();
