// llama.cpp on one GGUF file, through node-llama-cpp's prebuilt library (no compiler, no network). JSON on standard input and output.
//
//   {"model": PATH, "ids": [...], "count": N}  ->  {"log_probabilities": [[...]], "greedy": [...]}
//       the distribution after each of the ids, and the N tokens that follow them by always taking the likeliest one
//   {"model": PATH, "texts": [...]}            ->  {"tokens": [[...]], "with_specials": [[...]], "texts": [...], "eos": ID}
//
// The folder that holds node_modules is the working directory.

import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";

const found = createRequire(process.cwd() + "/").resolve("node-llama-cpp");
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(found).href);

const asked = JSON.parse(await new Response(process.stdin).text());
const llama = await getLlama({gpu: false, build: "never", skipDownload: true, logLevel: LlamaLogLevel.error, maxThreads: 1});
const model = await llama.loadModel({modelPath: asked.model, gpuLayers: 0, useMmap: false});
const answer = {};

if (asked.texts) {
    answer.tokens = asked.texts.map((text) => [...model.tokenize(text, false)]);
    answer.with_specials = asked.texts.map((text) => [...model.tokenize(text, true)]);
    answer.texts = answer.tokens.map((tokens) => model.detokenize(tokens));
    answer.eos = model.tokens.eos;
} else {
    const context = await model.createContext({contextSize: 128, threads: 1, flashAttention: false});
    const sequence = context.getSequence();
    const all = {generateNext: {probabilities: true, options: {temperature: 1, topK: 0, topP: 1, minP: 0}}};
    const rows = await sequence.controlledEvaluate(asked.ids.map((id) => [id, all]));
    answer.log_probabilities = rows.map(({next}) => {
        const row = new Array(next.probabilities.size).fill(0);
        for (const [token, probability] of next.probabilities) row[token] = Math.log(probability);
        return row;
    });
    answer.greedy = [];
    let next = rows.at(-1).next;
    while (answer.greedy.length < asked.count) {
        const [token] = next.probabilities.entries().next().value; // the likeliest one stands first
        answer.greedy.push(token);
        ({next} = (await sequence.controlledEvaluate([[token, all]]))[0]);
    }
}
process.stdout.write(JSON.stringify(answer, (_, value) => (value === -Infinity ? -1e30 : value)));
await llama.dispose();
process.exit(0);
