// SPDX-License-Identifier: GPL-2.0-only
// llama.cpp, as npm's node-llama-cpp has it, with its KV cache in pads: what it generates is
// what it generates with the cache on its heap. Prints TAP.
// usage: node engine_test.mjs ENGINE-DIRECTORY PLUGINS-DIRECTORY KVSCRATCHCTL MODELS [TEST...]
//
// In MODELS is random.gguf, whose heads have a multiple of 32 elements, and stories.gguf if
// there is a model that people know. The plug-ins are in ggml-2 and ggml-3 of their
// directory. Pads are those of KVSCRATCH_BACKEND. KVSCRATCH_KILLS (3) processes are killed.
import {spawn, spawnSync} from "node:child_process";
import {existsSync, mkdtempSync, readFileSync, rmSync} from "node:fs";
import {createInterface} from "node:readline";
import {tmpdir} from "node:os";
import {dirname, join, resolve} from "node:path";
import {fileURLToPath} from "node:url";

const [, , engine, plugins, kvscratchctl, models, ...chosen] = process.argv;
const model = join(models, "random.gguf"), stories = join(models, "stories.gguf");
const generate = join(dirname(fileURLToPath(import.meta.url)), "generate.mjs");
const runtime = mkdtempSync(join(tmpdir(), "kvscratch-engine-"));
const environment = {...process.env, XDG_RUNTIME_DIR: runtime, KVSCRATCH_GGML_STATS: "1"};
// A run that hangs is a failure; what one takes in a guest with detectors is far less.
const SECONDS = 300;

function plugin(version) {
	return resolve(plugins, `ggml-${version}`, "libggml-kvscratch.so");
}

class Failed extends Error {}

function expect(condition, what) {
	if (!condition)
		throw new Failed(what);
}

function expectSame(wanted, got, what) {
	const at = wanted.findIndex((line, i) => line !== got[i]);

	expect(at < 0 && wanted.length === got.length,
		`${what}: line ${at}: expected ${wanted[at]}, got ${got[at]} (${got.length} lines of ${wanted.length})`);
}

// A process that generates; onPause is called with its id and lets it go on when it returned.
function run(options, variables = {}, onPause = () => {}, onLine = () => {}) {
	const child = spawn(process.execPath, [generate, engine, JSON.stringify(options)],
		{env: {...environment, ...variables}, timeout: SECONDS * 1000, killSignal: "SIGKILL"});
	const lines = [];
	let errors = "", trouble;

	child.stderr.on("data", (text) => { errors += text; });
	createInterface({input: child.stdout}).on("line", (line) => {
		if (line !== '"pause"') {
			lines.push(line);
			onLine(child, lines);
			return;
		}
		try {
			onPause(child, lines);
		} catch (failure) {
			trouble = failure;
		}
		child.stdin.write("\n");
	});
	return new Promise((resolve, reject) => {
		child.on("close", (status, signal) => {
			if (trouble)
				reject(trouble);
			else
				resolve({status, signal, lines, errors});
		});
	});
}

const heapRuns = new Map();

// What the heap generates; asked for more than once
async function onHeap(options) {
	const key = JSON.stringify(options);

	if (!heapRuns.has(key))
		heapRuns.set(key, await run(options));
	return heapRuns.get(key);
}

function warnings(errors) {
	return errors.split("\n").filter((line) => line.startsWith("kvscratch-ggml: ") && !line.includes("commits"));
}

function counter(errors, name) {
	const found = errors.match(new RegExp(`kvscratch-ggml: .*\\b${name} (\\d+)`));

	expect(found, `expected counters, got ${errors}`);
	return Number(found[1]);
}

function onPads(options, variables, onPause, onLine) {
	return run({...options, pads: true}, {GGML_BACKEND_PATH: plugin(2), ...variables}, onPause, onLine);
}

function expectDone(done, what) {
	expect(done.status === 0, `${what}: status ${done.status}, signal ${done.signal}: ${done.errors}`);
}

// One cell of the matrix; privately: why it is not in pads, or undefined
async function sameText(options, privately, variables) {
	const what = JSON.stringify(options);
	const heap = await onHeap(options);
	const pads = await onPads(options, variables);

	expectDone(heap, `heap ${what}`);
	expectDone(pads, what);
	expectSame(heap.lines, pads.lines, what);
	expect(warnings(pads.errors).length === (privately ? 1 : 0), `${what}: ${pads.errors}`);
	if (privately)
		expect(warnings(pads.errors)[0].includes(privately), pads.errors);
	else
		expect(counter(pads.errors, "commits") >= options.tokens, pads.errors);
	return pads;
}

function ctl(...args) {
	const done = spawnSync(kvscratchctl, args, {env: environment, encoding: "utf8"});

	expect(done.status === 0, `kvscratchctl ${args.join(" ")}: ${done.status} ${done.stderr}`);
	return done.stdout;
}

function withHolder(body) {
	return async () => {
		ctl("hold", "engine", "--write");
		try {
			await body();
		} finally {
			ctl("drop", "engine");
		}
	};
}

function heldRows(pad) {
	return JSON.parse(ctl("info", "-n", `engine/${pad}`, "--json")).len;
}

const tests = {
	async four_hundred_tokens_equal_the_heaps() {
		await sameText({model, tokens: 400});
		if (existsSync(stories))
			await sameText({model: stories, tokens: 400});
	},

	async views_are_shared_and_read_only() {
		let maps;

		await onPads({model, tokens: 8, pauseAt: 4}, {}, (child) => {
			maps = readFileSync(`/proc/${child.pid}/maps`, "utf8").split("\n");
		});
		// a memfd has parts that its library writes to, which are no planes
		const views = maps.filter((line) => /^\S+ \S+s .*kvscratch/.test(line) && !/ rw-s .*memfd/.test(line));
		const bytes = views.map((line) => line.match(/^(\w+)-(\w+) /).slice(1).map((hex) => parseInt(hex, 16)))
			.reduce((sum, [from, to]) => sum + to - from, 0);

		// keys and values of three layers, 512 rows of 64 f16
		expect(bytes >= 3 * 2 * 512 * 128, `expected a view of each plane, got\n${views.join("\n")}`);
		for (const line of views)
			expect(/^\S+ r--s /.test(line), line);
	},

	held_rows_are_the_tokens: withHolder(async () => {
		await onPads({model, tokens: 20, pauseAt: 10}, {KVSCRATCH_GGML_HOLDER: "engine"}, (child, lines) => {
			const {rows} = JSON.parse(lines[lines.length - 1]);

			expect(heldRows("seq0") === rows, `expected ${rows} rows, got ${heldRows("seq0")}`);
		});
		// it is dead, and what it had is there
		expect(heldRows("seq0") > 20, `expected all rows, got ${heldRows("seq0")}`);
	}),

	next_process_keeps_what_the_last_one_left: withHolder(async () => {
		const variables = {KVSCRATCH_GGML_HOLDER: "engine"};

		expectDone(await onPads({model, tokens: 30}, variables), "first");
		const left = heldRows("seq0");

		expectDone(await onPads({model, tokens: 10}, variables), "second");
		expect(heldRows("seq0.old") === left && heldRows("seq0") === left - 20,
			`expected ${left} and ${left - 20} rows, got ${heldRows("seq0.old")} and ${heldRows("seq0")}`);
	}),

	async without_flash_attention() {
		await sameText({model, tokens: 60, flashAttention: false}, "v0 is not stored row by row");
	},

	async other_types() {
		for (const type of ["F32", "BF16", "Q8_0", "Q4_0"])
			await sameText({model, tokens: 60, type});
	},

	async two_sequences() {
		await sameText({model, tokens: 60, sequences: 2});
		// streams of quantized rows that small do not begin at a page
		await sameText({model, tokens: 60, sequences: 2, type: "Q8_0"}, "begin at a page");
	},

	async context_shift() {
		const options = {model, tokens: 300, context: 256, shift: true};

		await sameText(options, "is changed in place");
		await sameText({...options, sequences: 2}, "is changed in place");
	},

	async prompts_that_begin_anew() {
		const pads = await sameText({model, tokens: 20, repeat: 3});

		expect(counter(pads.errors, "truncates") === 2, pads.errors);
	},

	async another_version_of_the_interface() {
		const options = {model, tokens: 20};
		const heap = await onHeap(options);
		const other = await onPads(options, {GGML_BACKEND_PATH: plugin(3)});

		expectDone(other, "version 3");
		expectSame(heap.lines, other.lines, "version 3");
		expect(/incompatible API version/.test(other.errors), other.errors);
	},

	async no_pads_to_be_had() {
		await sameText({model, tokens: 20}, "private memory", {KVSCRATCH_BACKEND: "neither"});
	},

	async no_holder() {
		const options = {model, tokens: 20};
		const pads = await onPads(options, {KVSCRATCH_GGML_HOLDER: "nobody"});

		expectDone(pads, "no holder");
		expectSame((await onHeap(options)).lines, pads.lines, "no holder");
		expect(warnings(pads.errors).length === 1 && /nobody\/seq0 is not held/.test(pads.errors), pads.errors);
	},

	killed_at_any_moment_and_restored: withHolder(async () => {
		const options = {model, tokens: 400}, holder = {KVSCRATCH_GGML_HOLDER: "engine"};
		const all = (await onHeap(options)).lines.map((line) => JSON.parse(line));
		const ticket = join(runtime, "ticket");

		for (let kill = 0; kill < Number(process.env.KVSCRATCH_KILLS ?? 3); kill++) {
			// not in the prompt: a row of it computed alone differs in its last bits
			const after = Math.floor(Math.random() * 390) + 3;
			let killed;

			// one that has ended before it was killed does not count
			do
				killed = await onPads(options, holder, undefined,
					(child, lines) => lines.length === after && child.kill("SIGKILL"));
			while (killed.status === 0);
			const rows = heldRows("seq0");
			// the token that came of these rows, and was lost or not
			const next = all.findIndex((line) => line.rows === rows);

			expect(killed.signal === "SIGKILL" && next >= after - 1,
				`after ${after} tokens: signal ${killed.signal}, ${rows} rows`);
			ctl("llama", "ticket", "--state-version", "3", "engine/seq0", ticket);
			const restored = await onPads({model, tokens: 400 - next, restore: ticket}, holder);
			const lines = restored.lines.map((line) => JSON.parse(line));

			expectDone(restored, `after ${after} tokens`);
			expect(lines.shift().restored === rows, restored.lines[0]);
			expectSame(all.slice(next, -1).map(({token}) => token), lines.slice(0, -1).map(({token}) => token),
				`killed after ${after} tokens, ${rows} rows`);
			// it computed one row again, and copied none
			expect(lines.at(-1).evaluated[0] === 400 - next, restored.lines.at(-1));
			expect(counter(restored.errors, "forks") >= 1 && counter(restored.errors, "moves") === 0 &&
				warnings(restored.errors).length === 0, restored.errors);
		}
	}),

	a_ticket_for_what_is_gone_fails_its_request: withHolder(async () => {
		const ticket = join(runtime, "ticket");

		expectDone(await onPads({model, tokens: 30}, {KVSCRATCH_GGML_HOLDER: "engine"}), "first");
		ctl("llama", "ticket", "--state-version", "3", "engine/seq0", ticket);
		// other tokens under the same name
		expectDone(await onPads({model, tokens: 30, prompt: "Another one"}, {KVSCRATCH_GGML_HOLDER: "engine"}), "second");
		const refused = async (what) => {
			const restored = await onPads({model, tokens: 5, restore: ticket}, {});

			expect(restored.status === 1 && restored.signal === null && what.test(restored.errors) &&
				/stream 0 has to begin anew/.test(restored.errors), `${restored.status}: ${restored.errors}`);
		};

		// it is beside them
		const found = await onPads({model, tokens: 5, restore: ticket}, {});

		expectDone(found, "the one before");
		expect(counter(found.errors, "forks") === 1, found.errors);
		ctl("drop", "engine/seq0.old");
		await refused(/expected the \d+ tokens of the ticket, got others/);
		ctl("drop", "engine/seq0");
		await refused(/there is no pad "seq0"/);
	}),

	a_writer_that_is_fenced_fails_its_request: withHolder(async () => {
		const heap = await onHeap({model, tokens: 40});
		const pads = await onPads({model, tokens: 40, pauseAt: 10}, {KVSCRATCH_GGML_HOLDER: "engine"},
			() => ctl("takeover", "-n", "engine/seq0"));

		// an error of the engine's own, after all that was right
		expect(pads.status === 1 && pads.signal === null, `status ${pads.status}: ${pads.errors}`);
		expectSame(heap.lines.slice(0, pads.lines.length), pads.lines, "before it was fenced");
		expect(/stream 0 goes on in private memory/.test(pads.errors), pads.errors);
	}),
};

const names = chosen.length ? chosen : Object.keys(tests);

console.log(`TAP version 13\n1..${names.length}`);
for (const [i, name] of names.entries()) {
	try {
		const skip = await tests[name]();

		console.log(`ok ${i + 1} - ${name}${skip ? ` # SKIP ${skip}` : ""}`);
	} catch (failure) {
		console.log((failure instanceof Failed ? failure.message : failure.stack).replace(/^/gm, "# "));
		console.log(`not ok ${i + 1} - ${name}`);
	}
}
rmSync(runtime, {recursive: true});
