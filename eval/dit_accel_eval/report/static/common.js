"use strict";

const byId = (id) => document.getElementById(id);

/** An element with attributes and children; text becomes text nodes, never markup. */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const decibel = (value) => (value === null || value === undefined ? "not measured" : `${value.toFixed(1)} dB`);
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// From little to much, dark to light, so that it also reads without colour.
const RAMP = [[16, 20, 48], [42, 62, 138], [30, 124, 150], [92, 184, 118], [236, 226, 92]];

/** Colour of a share between 0 and 1 as [r, g, b]. */
function ramp(share) {
  const place = clamp(share, 0, 1) * (RAMP.length - 1);
  const low = Math.min(Math.floor(place), RAMP.length - 2);
  return RAMP[low].map((value, i) => Math.round(value + (RAMP[low + 1][i] - value) * (place - low)));
}

function drawScale(canvas) {
  const context = canvas.getContext("2d");
  for (let x = 0; x < canvas.width; x++) {
    context.fillStyle = `rgb(${ramp(x / (canvas.width - 1)).join(",")})`;
    context.fillRect(x, 0, 1, canvas.height);
  }
}

/** Whether a key press belongs to the control that has the focus. */
function isEditing(event) {
  return event.target.closest("select, input, textarea, a, summary") !== null;
}
