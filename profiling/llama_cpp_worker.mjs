// llama.cpp as a contestant of generate.py and serve.py, through node-llama-cpp's prebuilt library (`make peers`): no compiler is needed.
//
//   node llama_cpp_worker.mjs MODEL.gguf CONTEXT THREADS SEQUENCES
//
// The binding takes 7 to 12 ms for each token at a vocabulary of 32,000, so rates of decoding are a lower bound of llama.cpp's (NOTES.md).
// The working directory holds node_modules. Answers lines of JSON on standard input, each with one line:
//   {"prefill": [tokens]}            -> the next token
//   {"decode": [token, count]}       -> the last of `count` greedy tokens after the prompt, which is restored afterwards
//   {"together": [[tokens], ...], "count": N, "late": [tokens] | null}
//       N greedy tokens for each prompt, all at once; `late` is asked for when every other has its first token
//                                    -> {"seconds": of all, "late_first": seconds from asking to its first token}

import {createRequire} from "node:module";
import {createInterface} from "node:readline";
import {pathToFileURL} from "node:url";

const found = createRequire(process.cwd() + "/").resolve("node-llama-cpp");
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(found).href);
const [path, size, threads, sequences] = process.argv.slice(2);
const llama = await getLlama({gpu: false, build: "never", skipDownload: true, logLevel: LlamaLogLevel.error, maxThreads: +threads});
const model = await llama.loadModel({modelPath: path, gpuLayers: 0, useMmap: false});
const context = await model.createContext({contextSize: +size, sequences: +sequences, threads: +threads, batchSize: 512});
const held = Array.from({length: +sequences}, () => context.getSequence());
const greedy = {temperature: 0};

async function take(sequence, tokens, count, onFirst) {
    let last = -1, taken = 0;
    for await (const token of sequence.evaluate(tokens, {...greedy, yieldEogToken: true})) {
        if (!taken++) onFirst?.();
        last = token;
        if (taken === count) break;
    }
    return last;
}

async function together(prompts, count, late) {
    await Promise.all(held.map((sequence) => sequence.clearHistory()));
    const begun = performance.now();
    let waiting = prompts.length, allFirst, lateFirst = null;
    const everyoneHasOne = new Promise((resolve) => (allFirst = resolve));
    const running = prompts.map((prompt, i) => take(held[i], prompt, count, () => --waiting || allFirst()));
    if (late) {
        await everyoneHasOne;
        const asked = performance.now();
        await take(held[prompts.length], late, 1, () => (lateFirst = (performance.now() - asked) / 1e3));
    }
    await Promise.all(running);
    return {seconds: (performance.now() - begun) / 1e3, late_first: lateFirst};
}

let prompt = 0;
console.log("ready");
for await (const line of createInterface({input: process.stdin})) {
    const asked = JSON.parse(line);
    let answer;
    if (asked.prefill) {
        await held[0].clearHistory();
        answer = await take(held[0], asked.prefill, 1);
        prompt = held[0].nextTokenIndex;
    } else if (asked.decode) {
        answer = await take(held[0], [asked.decode[0]], asked.decode[1]);
        await held[0].eraseContextTokenRanges([{start: prompt, end: held[0].nextTokenIndex}]);
    } else {
        answer = await together(asked.together, asked.count, asked.late);
    }
    console.log(JSON.stringify(answer));
}
process.exit(0);
