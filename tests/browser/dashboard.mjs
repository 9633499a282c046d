// Uses the dashboard of a live run as a person does: looks, clicks, types, and stops the run. Prints one line of JSON with what it
// measured; ends with status 1 and a message where the page is not as promised.
//
//     node dashboard.mjs URL TOKEN FOLDER      FOLDER gets the screenshots
//
// CLOZE_NODE_PACKAGES names the folder whose node_modules holds playwright-core, CLOZE_CHROMIUM the browser.

import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { join } from "node:path";

const ARGUMENTS = [
  "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync",
];
// Longest wait for anything on the page, in milliseconds; generous, because other tests share the machine.
const PATIENCE_MS = 60_000;
const DESKTOP = { width: 1280, height: 900 };
const PHONE = { width: 360, height: 740 };

const [url, token, folder] = process.argv.slice(2);
const { chromium } = createRequire(join(process.env.CLOZE_NODE_PACKAGES, "package.json"))("playwright-core");

const measured = {};

function shot(page, name) {
  return page.screenshot({ path: join(folder, `${name}.png`), fullPage: true });
}

function newestStep(page) {
  return page.evaluate(() => Number(document.getElementById("loss-chart").dataset.newest));
}

async function chartsGrowWithoutReload(page) {
  await page.evaluate(() => { window.markOfThisLoad = true; });
  await page.waitForFunction(() => Number(document.getElementById("loss-chart").dataset.newest) > 0);
  const before = await newestStep(page);
  await page.waitForFunction((step) => Number(document.getElementById("loss-chart").dataset.newest) > step, before);
  measured.steps = [before, await newestStep(page)];
  assert.ok(await page.evaluate(() => window.markOfThisLoad), "the page was loaded again");
  for (const id of ["loss", "speed"]) {
    assert.match(await page.textContent(`#${id}-text`), /^From [\d.]+ .* at step \d+ to [\d.]+ at step \d+; lowest [\d.]+, highest [\d.]+\.$/);
    const labels = await page.locator(`#${id}-chart text`).allTextContents();
    assert.ok(labels.includes("step"), `the ${id} chart has no label of its steps: ${labels}`);
    assert.ok(labels.filter((text) => /^[\d.]+[kMG]?$/.test(text)).length >= 4, `the ${id} chart lacks ticks: ${labels}`);
  }
  assert.ok((await page.locator("#loss-chart text").allTextContents()).includes("loss"));
  assert.ok((await page.locator("#speed-chart text").allTextContents()).includes("tokens/s"));
}

async function switchesFollowMouseAndKeyboard(page) {
  const log = page.getByRole("button", { name: "Log scale" });
  await log.click();
  await page.locator('#loss-chart[data-scale="log"]').waitFor();
  assert.equal(await log.getAttribute("aria-pressed"), "true");
  assert.ok((await page.locator("#loss-chart text").allTextContents()).includes("loss (log)"));
  await shot(page, "log-scale");
  // Once more with the tab key alone, from the top of a fresh page.
  await page.reload();
  await page.locator('#state[data-state="training"]').waitFor();
  await page.keyboard.press("Tab");
  const first = await page.evaluate(() => document.activeElement.textContent);
  assert.equal(first, "Skip to the run", "the first stop is the skip link");
  for (let stops = 0; stops < 10 && !(await log.evaluate((button) => button === document.activeElement)); stops += 1) {
    await page.keyboard.press("Tab");
  }
  assert.ok(await log.evaluate((button) => button === document.activeElement), "the switch is not reached with the tab key");
  const outline = await log.evaluate((button) => getComputedStyle(button).outlineStyle);
  assert.notEqual(outline, "none", "the focus is not shown");
  for (const scale of ["log", "linear"]) {
    await page.keyboard.press("Enter");
    await page.locator(`#loss-chart[data-scale="${scale}"]`).waitFor();
  }
  await page.keyboard.press("Tab");
  await page.keyboard.press("Space");
  await page.locator('#loss-chart[data-smoothing="off"]').waitFor();
  assert.equal(await page.locator("#loss-chart path").count(), 1);
  await page.keyboard.press("Space");
  await page.locator('#loss-chart[data-smoothing="on"]').waitFor();
  assert.equal(await page.locator("#loss-chart path").count(), 2);
}

async function tablesTellTheWorkers(page) {
  await page.waitForFunction(() => document.querySelectorAll("#workers tbody tr td[data-state='training']").length === 2);
  const rows = await page.locator("#workers tbody tr").evaluateAll((all) => all.map((row) => [...row.cells].map((cell) => cell.textContent)));
  assert.deepEqual(rows.map((row) => [row[0], row[1], row[2], row[5]]), [["0", "training", "0", "0"], ["1", "training", "1", "0"]]);
  for (const row of rows) {
    assert.notEqual(row[3], "–", "a host");
    assert.match(row[4], /^\d+$/, "a process id");
  }
  for (const id of ["workers", "failures", "checkpoints"]) {
    assert.ok((await page.textContent(`#${id} caption`)).length > 0, `the ${id} table has a caption`);
    assert.equal(await page.locator(`#${id} thead th:not([scope="col"])`).count(), 0);
  }
  assert.equal(await page.locator('#workers tbody th[scope="row"]').count(), 2);
  assert.equal(await page.textContent("#failures-caption"), "None so far");
  assert.equal(await page.textContent("#state"), "training");
  assert.match(await page.textContent("#bar-text"), /^\d+ of \d+ steps, \d+ %$/);
  assert.match(await page.textContent("#data"), /^\d+ of \d+ examples$/);
  assert.match(await page.textContent("#eta"), /^\d+:\d\d/);
}

// A worker is killed while somebody looks: the failure appears with cause, decision and recovery time, and the run goes on.
async function aFailureAppears(page) {
  const cells = page.locator("#workers tbody tr").nth(1).locator("td, th");
  process.kill(Number(await cells.nth(4).textContent()), "SIGKILL");
  await page.waitForFunction(() => [...document.querySelectorAll("#failures tbody tr")].some((row) => row.textContent.includes("memory of worker 0")));
  assert.equal(await page.textContent("#failures-caption"), "1 failure, newest first");
  const columns = await page.locator("#failures thead th").allTextContents();
  const row = await page.locator("#failures tbody tr").evaluate((only) => [...only.cells].map((cell) => cell.textContent));
  measured.failure = Object.fromEntries(columns.map((column, place) => [column, row[place]]));
  await page.waitForFunction(() => document.querySelectorAll("#workers tbody tr td[data-state='training']").length === 2);
  await shot(page, "failure");
}

async function isAccessible(page) {
  for (const role of ["banner", "main", "contentinfo"]) assert.equal(await page.getByRole(role).count(), 1, `landmark ${role}`);
  const unnamed = await page.evaluate(() => {
    const named = (field) => field.getAttribute("aria-label") || field.textContent.trim() || field.labels?.length > 0;
    return [...document.querySelectorAll("button, input")].filter((field) => !named(field)).map((field) => field.id);
  });
  assert.deepEqual(unnamed, [], "every control has a name");
  assert.equal(await page.locator("#state").getAttribute("aria-live"), "polite");
}

async function fitsAPhone(page) {
  await page.setViewportSize(PHONE);
  await page.waitForFunction((width) => document.getElementById("loss-chart").viewBox.baseVal.width <= width, PHONE.width);
  const [content, screen] = await page.evaluate(() => [document.documentElement.scrollWidth, document.documentElement.clientWidth]);
  assert.ok(content <= screen, `the page is ${content} pixels wide on a screen of ${screen}`);
  measured.phone = [content, screen];
  await shot(page, "phone");
  await page.setViewportSize(DESKTOP);
}

async function followsTheColourScheme(page) {
  const paper = async (colorScheme) => {
    await page.emulateMedia({ colorScheme });
    return page.evaluate(() => getComputedStyle(document.body).backgroundColor);
  };
  const dark = await paper("dark");
  await shot(page, "dark");
  const light = await paper("light");
  await shot(page, "light");
  assert.deepEqual([dark, light], ["rgb(20, 23, 26)", "rgb(255, 255, 255)"]);
  for (const colorScheme of ["dark", "light"]) {
    await page.emulateMedia({ colorScheme });
    const ratio = await page.evaluate(leastContrast);
    assert.ok(ratio >= 4.5, `${colorScheme}: a text has a contrast of ${ratio.toFixed(2)}`);
    measured[colorScheme] = Number(ratio.toFixed(2));
  }
}

// The least contrast between a visible text and the page behind it, as WCAG 2 computes it. Runs in the page.
function leastContrast() {
  const numbers = (colour) => colour.match(/[\d.]+/g).map(Number);
  const luminance = (colour) => {
    const linear = (part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    const [red, green, blue] = numbers(colour).map((part) => linear(part / 255));
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const paper = (node) => {
    for (let each = node; each; each = each.parentElement) {
      const colour = getComputedStyle(each).backgroundColor;
      if (numbers(colour)[3] !== 0) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const hasText = (node) => [...node.childNodes].some((child) => child.nodeType === Node.TEXT_NODE && child.data.trim());
  const ratios = [...document.body.querySelectorAll("*")]
    .filter((node) => !node.disabled && node.getClientRects().length > 0 && hasText(node))
    .map((node) => {
      const style = getComputedStyle(node);
      const ink = node instanceof SVGElement ? style.fill : style.color;
      const [high, low] = [luminance(ink), luminance(paper(node))].sort((a, b) => b - a);
      return (high + 0.05) / (low + 0.05);
    });
  return Math.min(...ratios);
}

async function tellsALostConnection(context) {
  const page = await context.newPage();
  page.setDefaultTimeout(PATIENCE_MS);
  await page.route("**/api/events", (route) => route.abort());
  await page.goto(url);
  await page.getByText("The connection to the run is lost. Reconnecting…").waitFor();
  await page.unroute("**/api/events");
  await page.locator('#state[data-state="training"]').waitFor();
  await page.locator("#connection").waitFor({ state: "hidden" });
  await page.close();
}

async function stopsWithTheToken(page) {
  const stop = page.getByRole("button", { name: "Stop the run" });
  const save = page.getByRole("button", { name: "Save a checkpoint" });
  const field = page.getByRole("textbox", { name: "Token" });
  assert.ok(await stop.isDisabled() && await save.isDisabled(), "orders need a token");
  await field.fill("wrong");
  await save.click();
  await page.getByText("Refused: orders need the run's token.").waitFor();
  await field.fill(token);
  await save.click();
  await page.getByText("A checkpoint will be saved at the next step.").waitFor();
  await page.waitForFunction(() => document.querySelectorAll("#checkpoints tbody tr").length > 0);
  await stop.click();
  await page.locator("#confirm").waitFor();
  assert.equal(await page.evaluate(() => document.activeElement.id), "confirm-stop", "the focus goes to the question");
  await shot(page, "confirm");
  await page.keyboard.press("Escape");
  await page.locator("#confirm").waitFor({ state: "hidden" });
  await stop.click();
  await page.getByRole("button", { name: "Yes, stop it" }).click();
  await page.locator('#state[data-state="stopped"]').waitFor();
  await page.getByText("The run has ended. This page shows its last state.").waitFor();
  assert.ok(await stop.isDisabled(), "an ended run takes no orders");
  await shot(page, "stopped");
}

const browser = await chromium.launch({ executablePath: process.env.CLOZE_CHROMIUM ?? "/usr/bin/chromium", args: ARGUMENTS });
try {
  // Without motion a colour is what it is at once.
  const context = await browser.newContext({ viewport: DESKTOP, reducedMotion: "reduce" });
  await tellsALostConnection(context);
  const page = await context.newPage();
  page.setDefaultTimeout(PATIENCE_MS);
  const problems = [];
  const foreign = [];
  page.on("console", (message) => message.type() === "error" && problems.push(message.text()));
  page.on("pageerror", (error) => problems.push(String(error)));
  const isForeign = (address) => !address.startsWith("data:") && new URL(address).host !== new URL(url).host;
  page.on("request", (request) => isForeign(request.url()) && foreign.push(request.url()));
  await page.goto(url);
  await page.locator('#state[data-state="training"]').waitFor();
  await chartsGrowWithoutReload(page);
  await switchesFollowMouseAndKeyboard(page);
  await tablesTellTheWorkers(page);
  await aFailureAppears(page);
  await isAccessible(page);
  await fitsAPhone(page);
  await followsTheColourScheme(page);
  assert.deepEqual(problems, [], "the page reports no errors while the run trains");
  await stopsWithTheToken(page);
  assert.deepEqual(foreign, [], "nothing is loaded from elsewhere");
  console.log(JSON.stringify(measured));
} finally {
  await browser.close();
}
