// Numbers and elements as people read them. Text goes in as text: nothing here makes HTML.

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== null && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

export function bytes(count) {
  const units = ["B", "kB", "MB", "GB", "TB", "PB"];
  let power = 0;
  while (count >= 999.5 && power < units.length - 1) {
    count /= 1000;
    power += 1;
  }
  return `${power && count < 99.5 ? count.toFixed(1) : Math.round(count)} ${units[power]}`;
}

export const whole = (count) => Math.round(count).toLocaleString("en-US");
export const percent = (share) => `${(100 * share).toFixed(1)} %`;

export const seconds = (count) => (count < 600 ? `${number(count)} s` : duration(count));

export function number(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-3) return value.toExponential(1);
  return String(Number(value.toPrecision(3)));
}

export function duration(seconds) {
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  if (seconds < 129600) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86400)} d`;
}

export function ago(at) {
  const seconds = Math.max(0, Date.now() / 1000 - at);
  return seconds < 5 ? "now" : `${duration(Math.floor(seconds)).replace(".0", "")} ago`;
}
