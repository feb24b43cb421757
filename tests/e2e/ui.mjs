// What a data scientist does in the Kubeflow UI: finds the pipeline, fills in the form, starts a run, watches its graph go
// green, and opens the report. Screenshots of it go into a folder.
//
//     npm install --no-save playwright-core
//     node tests/e2e/ui.mjs http://ml-pipeline-ui.kubeflow docs/images '{"cluster_coteries": "2"}'
//
// CHROMIUM names the browser (Debian's: apt-get install chromium). The run may take an hour.
import { mkdir } from "node:fs/promises";
import { chromium } from "playwright-core";

const [url, folder, settings = "{}"] = process.argv.slice(2);
if (!folder) throw new Error("usage: node ui.mjs URL FOLDER [SETTINGS as JSON]");
const STEP = 60_000, RUN = 3_600_000; // milliseconds

await mkdir(folder, { recursive: true });
const executablePath = process.env.CHROMIUM ?? "/usr/bin/chromium";
const browser = await chromium.launch({ executablePath, args: process.getuid() ? [] : ["--no-sandbox"] });
const page = await browser.newPage({ viewport: { width: 1200, height: 750 } });
page.setDefaultTimeout(STEP);

async function show(name) {
  await page.waitForTimeout(2000); // what moves comes to rest
  await page.screenshot({ path: `${folder}/${name}.png` });
  console.log(`    ${name}: ${page.url()}`);
}

// The steps of the layer that is shown, whose sign is not the green tick: a circle with it, where a turning arrow is "running".
const waiting = () => page.$$eval(".react-flow__node-EXECUTION", (nodes) => nodes
  .filter((node) => !/bg-mui-green/.test(node.innerHTML) || /M17\.65 6\.35/.test(node.innerHTML))
  .map((node) => node.innerText));

try {
  await page.goto(`${url}/#/pipelines`);
  await page.getByRole("link", { name: "coteries" }).click();
  await page.waitForSelector(".react-flow__node");
  await page.getByRole("button", { name: "Create run" }).click();

  await page.click("#chooseExperimentBtn");
  await page.getByText("coterie", { exact: true }).click();
  await page.click("#useExperimentBtn");
  for (const [name, value] of Object.entries(JSON.parse(settings))) {
    await page.fill(`#${name}`, typeof value === "string" ? value : JSON.stringify(value));
  }
  await page.locator("#cluster_coteries").scrollIntoViewIfNeeded();
  await show("kubeflow-form");
  await page.click("#startNewRunBtn");

  // The form ends on the list of runs, newest first.
  await page.waitForURL(/#\/runs(\?|$)|#\/experiments/);
  await page.locator('a[href*="runs/details"]').first().click();
  await page.waitForURL(/runs\/details/);
  const run = page.url().split("/").pop();
  const began = Date.now();
  for (let state = ""; state !== "SUCCEEDED"; await page.waitForTimeout(5000)) {
    ({ state } = await (await page.request.get(`${url}/apis/v2beta1/runs/${run}`)).json());
    if (["FAILED", "CANCELED"].includes(state)) throw new Error(`the run ${run} has ${state.toLowerCase()}`);
    if (Date.now() - began > RUN) throw new Error(`the run ${run} has not ended`);
  }
  console.log(`    the run succeeded after ${Math.round((Date.now() - began) / 1000)} s`);

  await page.reload();
  await page.locator(".react-flow__node-SUB_DAG svg").last().click(); // into the stages
  const node = (id) => page.locator(`[data-id="${id}"] button`);
  await node("artifact.report.page").waitFor({ state: "attached" });
  for (let left = null; left === null || left.length; await page.waitForTimeout(2000)) {
    left = await waiting();
    if (Date.now() - began > RUN) throw new Error(`in the graph these are not green: ${left}`);
  }
  await page.locator(".react-flow__controls-fitview").click();
  await show("kubeflow-graph");

  await node("artifact.report.page").click();
  await page.getByRole("button", { name: "Visualization" }).click();
  const report = page.frameLocator("iframe").first();
  await report.locator("h1").first().waitFor();
  await show("kubeflow-report");
  console.log(`    the report says: ${(await report.locator("h1").first().innerText()).trim()}`);
} catch (error) {
  await page.screenshot({ path: `${folder}/failed.png` });
  throw error;
} finally {
  await browser.close();
}
