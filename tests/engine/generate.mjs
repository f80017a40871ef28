// SPDX-License-Identifier: GPL-2.0-only
// Generate tokens with node-llama-cpp, greedily, and print them as they come.
// usage: node generate.mjs ENGINE-DIRECTORY JSON
//
//   model           path of a GGUF file
//   prompt          text, or a list of token ids after BOS; default "Once upon a time"
//   tokens          how many to generate
//   context         size of the context; default 512
//   pads            let backends that call themselves a GPU have the cache
//   flashAttention  true (default), false or "auto"
//   type            of keys and values: "F16" (default), "Q8_0", "F32", ...
//   sequences       how many generate from the prompt, in turns; default 1
//   shift           on: the oldest tokens go when the context is full
//   restore         path of a saved sequence, which goes on with its last token
//   save            path to save sequence 0 to at the end
//   pauseAt         after so many tokens: print "pause", and go on after a line of input
//   repeat          how often all is done in this process, each time from an empty context
//   reuse           the part of a repeated prompt's rows that is kept, 0 to 1; default 0
//
// A line of JSON for each token, {"sequence": 0, "token": 1, "rows": 5}, where rows is what
// the cache has had evaluated before; then {"text": [...], "evaluated": [...]}, the tokens
// that each sequence had computed: a prompt and all but the last one that came of it. After
// restore {"restored": 7} is first, and 1 of them is computed again.
//
// A list of such objects, whose model and pads are the first one's, is done in one process,
// each with a context of its own, after a line {"run": 0}; one that the engine refuses to
// do says {"refused": WHY} and ends.
import {createInterface} from "node:readline";
import {writeSync} from "node:fs";
import {pathToFileURL} from "node:url";

const [, , engine, json] = process.argv;
const given = JSON.parse(json);
const runs = (Array.isArray(given) ? given : [given]).map((options) => ({prompt: "Once upon a time", context: 512,
	pads: false, flashAttention: true, type: "F16", sequences: 1, shift: false, repeat: 1, reuse: 0, ...options}));
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(`${engine}/node_modules/node-llama-cpp/dist/index.js`));

// at once: what was printed is what a killed process had
function print(line) {
	writeSync(1, JSON.stringify(line) + "\n");
}

const input = createInterface({input: process.stdin})[Symbol.asyncIterator]();

const {model: modelPath, pads} = runs[0];
const llama = await getLlama({gpu: pads ? "auto" : false, build: "never", skipDownload: true,
	usePrebuiltBinaries: true, logLevel: LlamaLogLevel.warn, progressLogs: false});
const model = await llama.loadModel({modelPath, gpuLayers: pads ? 999 : 0, useMmap: true});

async function begin(sequence, prompt, restore) {
	if (!restore)
		return prompt;
	await sequence.loadStateFromFile(restore, {acceptRisk: true});
	const restored = sequence.contextTokens;
	print({restored: restored.length});
	// its logits are not in the file
	const last = restored[restored.length - 1];
	await sequence.eraseContextTokenRanges([{start: restored.length - 1, end: restored.length}]);
	return [last];
}

async function generate(options) {
	const context = await model.createContext({contextSize: options.context, threads: 1,
		flashAttention: options.flashAttention, sequences: options.sequences, batchSize: options.batch ?? 512,
		experimentalKvCacheKeyType: options.type, experimentalKvCacheValueType: options.type});
	const prompt = [model.tokens.bos,
		...Array.isArray(options.prompt) ? options.prompt : model.tokenize(options.prompt)];
	const shift = options.shift ? {size: Math.floor(options.context / 4), strategy: "eraseBeginning"} :
		{strategy: () => { throw new Error("the context is full"); }};

	for (let round = 0; round < options.repeat; round++) {
		const texts = [];
		for (let i = 0; i < options.sequences; i++) {
			const sequence = context.getSequence();
			let first = await begin(sequence, prompt, options.restore);
			const kept = Math.floor(prompt.length * options.reuse);
			if (round && kept && !options.restore) {
				first = prompt.slice(Math.min(kept, sequence.nextTokenIndex));
			}
			texts.push({sequence, tokens: sequence.evaluate(first, {temperature: 0, contextShift: shift})[Symbol.asyncIterator](),
				generated: []});
		}
		for (let n = 0; n < options.tokens; n++) {
			for (const [i, text] of texts.entries()) {
				const {value, done} = await text.tokens.next();
				if (done)
					throw new Error(`sequence ${i} ended after ${n} tokens`);
				text.generated.push(value);
				print({sequence: i, token: value, rows: text.sequence.nextTokenIndex});
			}
			if (options.pauseAt === n + 1) {
				print("pause");
				await input.next();
			}
		}
		if (options.save)
			await texts[0].sequence.saveStateToFile(options.save);
		print({text: texts.map(({generated}) => model.detokenize(generated)),
			evaluated: texts.map(({sequence: {tokenMeter}}) => tokenMeter.usedInputTokens + tokenMeter.usedOutputTokens)});
		for (const text of texts) {
			await text.tokens.return();
			text.sequence.dispose();
		}
	}
	await context.dispose();
}

for (const [i, options] of runs.entries()) {
	if (!Array.isArray(given)) {
		await generate(options);
		continue;
	}
	print({run: i});
	try {
		await generate(options);
	} catch (error) {
		print({refused: error.message});
	}
}
process.exit(0);
