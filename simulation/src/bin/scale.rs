//! `make scale`: what a cloud costs at a thousand, ten thousand, … machines. A table, and a bar for each figure that
//! should not grow.

use clap::Parser;
use simulation::scale::{Cost, measure};

/// Measures the model as the cloud grows.
#[derive(Parser)]
struct Arguments {
    /// Sizes: machines, on a hundredth as many hosts; one line of the table each.
    #[arg(long, value_delimiter = ',', default_values_t = [1_000, 10_000, 100_000, 1_000_000])]
    machines: Vec<u64>,
}

/// Machines on one host.
const A_NODE: u64 = 100;
/// Characters of the longest bar.
const WIDTH: f64 = 40.0;

fn main() {
    let Arguments { machines } = Arguments::parse();
    println!(
        "{:>9} {:>7} {:>9} {:>9} {:>10} {:>10} {:>10} {:>10} {:>10} {:>9} {:>9} {:>9}",
        "machines",
        "hosts",
        "memory",
        "stored",
        "created",
        "decided",
        "placed",
        "reported",
        "idle plan",
        "page",
        "load",
        "bill"
    );
    println!(
        "{:>9} {:>7} {:>9} {:>9} {:>10} {:>10} {:>10} {:>10} {:>10} {:>9} {:>9} {:>9}",
        "", "", "B each", "B each", "a second", "a second", "a second", "a second", "ms", "us", "s", "s"
    );
    let mut costs = Vec::new();
    for machines in machines {
        let cost = measure(machines.div_ceil(A_NODE), machines);
        println!(
            "{:>9} {:>7} {:>9} {:>9} {:>10.0} {:>10.0} {:>10.0} {:>10.0} {:>10.3} {:>9.1} {:>9.3} {:>9.3}",
            cost.machines,
            cost.nodes,
            cost.bytes_a_machine,
            cost.stored_bytes_a_machine,
            cost.created,
            cost.decided,
            cost.placed,
            cost.reported,
            cost.idle_plan.as_secs_f64() * 1e3,
            cost.page.as_secs_f64() * 1e6,
            cost.load.as_secs_f64(),
            cost.bill.as_secs_f64(),
        );
        assert!(cost.bill_agrees, "a state that was loaded again bills something else");
        costs.push(cost);
    }
    println!();
    bars("memory of a machine, bytes", &costs, |cost| cost.bytes_a_machine as f64);
    bars("to create a machine, us", &costs, |cost| 1e6 / cost.created);
    bars("to decide where it goes, us", &costs, |cost| 1e6 / cost.decided);
    bars("to place it, us", &costs, |cost| 1e6 / cost.placed);
    bars("to load it, us", &costs, |cost| cost.load.as_secs_f64() * 1e6 / cost.machines as f64);
    bars("to bill it, us", &costs, |cost| cost.bill.as_secs_f64() * 1e6 / cost.machines as f64);
}

fn bars(what: &str, costs: &[Cost], of: impl Fn(&Cost) -> f64) {
    println!("{what}");
    let most = costs.iter().map(&of).fold(f64::MIN_POSITIVE, f64::max);
    for cost in costs {
        let bar = "▇".repeat((of(cost) / most * WIDTH).round() as usize);
        println!("{:>9}  {bar} {:.1}", cost.machines, of(cost));
    }
    println!();
}
