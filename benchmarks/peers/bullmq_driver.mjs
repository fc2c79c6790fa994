// The driver of BullMQ on Node and Redis: one worker in this process, 200 jobs at once.
//
// Run by `benchmarks.systems`; speaks the wire of wire.py. Settings: ioredis (its default client) over a
// unix socket, concurrency 200, finished jobs removed (kept ones would fill Redis's memory). Three steps
// are a flow of three jobs in a line: a parent whose child has a child.

import { createInterface } from 'node:readline';
import { FlowProducer, Queue, Worker } from 'bullmq';

const PAYLOAD = { customer: 'c-1042', text: 'x'.repeat(193) };
const SLOTS = 200;
const BATCH = 1000;
const SETTLED_MS = 1500;
const PAUSE_MS = 20;
const REMOVED = { removeOnComplete: true };
const QUEUE = 'bench';

const sleep = (ms) => new Promise((done) => setTimeout(done, ms));
const now = () => performance.now() / 1000;

class Bench {
  constructor(path) {
    this.connection = { path, maxRetriesPerRequest: null };
    this.queue = new Queue(QUEUE, { connection: this.connection, defaultJobOptions: REMOVED });
    this.flows = new FlowProducer({ connection: this.connection });
  }

  // Runs a worker for as long as `body` takes; `onStart` is the job's only code.
  async withWorker(onStart, body) {
    const worker = new Worker(QUEUE, async () => onStart(now()), {
      connection: this.connection,
      concurrency: SLOTS,
      autorun: false,
    });
    const state = { ended: 0 };
    worker.on('completed', () => { state.ended += 1; });
    worker.on('error', (error) => console.error(error));
    await worker.waitUntilReady();
    const running = worker.run();
    try {
      return await body(state);
    } finally {
      await worker.close();
      await running;
    }
  }

  sizes(count) {
    const found = [];
    for (let start = 0; start < count; start += BATCH) found.push(Math.min(BATCH, count - start));
    return found;
  }

  async fill(count) {
    for (const size of this.sizes(count)) {
      await this.queue.addBulk(Array.from({ length: size }, () => ({ name: 'noop', data: PAYLOAD })));
    }
  }

  flow() {
    const job = (name, children) => ({ name, queueName: QUEUE, data: PAYLOAD, opts: REMOVED, children });
    return job('third', [job('second', [job('first', [])])]);
  }

  async drainAll(jobs) {
    let began = 0;
    const onStart = (at) => { began ||= at; };
    return this.withWorker(onStart, async (state) => {
      while (state.ended < jobs) await sleep(2);
      return { took_s: now() - began };
    });
  }

  async submit(count) {
    const took = [];
    await this.queue.add('noop', PAYLOAD);
    for (let n = 0; n < count; n += 1) {
      const began = now();
      await this.queue.add('noop', PAYLOAD);
      took.push(now() - began);
    }
    await this.queue.obliterate({ force: true });
    return { took_s: took };
  }

  async bulk(count) {
    const began = now();
    await this.fill(count);
    const took = now() - began;
    await this.queue.obliterate({ force: true });
    return { took_s: took };
  }

  async drain(count) {
    await this.fill(count);
    return this.drainAll(count);
  }

  async steps(count) {
    for (const size of this.sizes(count)) {
      await this.flows.addBulk(Array.from({ length: size }, () => this.flow()));
    }
    return this.drainAll(3 * count);
  }

  async idle(count) {
    const took = [];
    let reached = () => {};
    return this.withWorker((at) => reached(at), async (state) => {
      await sleep(SETTLED_MS);
      for (let n = 0; n < count; n += 1) {
        const started = new Promise((done) => { reached = done; });
        const began = now();
        await this.queue.add('mark', PAYLOAD);
        took.push((await started) - began);
        await sleep(PAUSE_MS);
      }
      while (state.ended < count) await sleep(2);
      return { took_s: took };
    });
  }
}

let bench;
for await (const line of createInterface({ input: process.stdin })) {
  const order = JSON.parse(line);
  if (bench === undefined) {
    bench = new Bench(order.redis);
    await bench.queue.waitUntilReady();
    process.stdout.write('{"ready":true}\n');
  } else {
    process.stdout.write(`${JSON.stringify(await bench[order.do](order.count))}\n`);
  }
}
process.exit(0);
